"""Attention with a trained bias, in Triton.

``tiles.py`` holds what the kernels share, ``forward.py``, ``forward_rows.py``,
``backward_queries.py`` and ``backward_keys.py`` the kernels, ``arguments.py`` how tensors become
kernel arguments, ``run.py`` the order of launches, ``ops.py`` the registered operators. Nothing
here is imported before an operation runs on Triton.
"""
