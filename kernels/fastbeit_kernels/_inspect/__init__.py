"""The compile report: what kernels become for a GPU that need not be there (``inspect.py``)."""
