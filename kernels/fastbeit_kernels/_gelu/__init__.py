"""GELU (exact) of x + bias, in Triton: ``kernels.py``, ``configs.py``, and ``ops.py``, which has
the registered operators and how tensors become kernel arguments."""
