"""Speed, and correctness on a device. Needs torch (and Triton for the kernels); peers are optional.

python -m pytest benchmarks/ --benchmark-only --record    the suites, on any machine, recorded
PYTHONPATH=kernels:. python -m benchmarks.gpu             everything about a GPU, in under 9 minutes
python -m benchmarks.report                               docs/performance.md from the results
python -m benchmarks.regress                              the newest run against the one before it
"""
