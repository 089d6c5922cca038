"""Speed, and correctness on a device. Needs torch (and Triton for the kernels); peers are optional.

PYTHONPATH=kernels:. python -m benchmarks.gpu       everything about a GPU, in under 9 minutes
pytest benchmarks/ --benchmark-only                 what a CPU can tell
python -m benchmarks.report                         docs/performance.md from benchmarks/results/
"""
