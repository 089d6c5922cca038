"""Attention with a trained bias, in Triton.

``tiles.py`` holds what the kernels share, ``forward.py`` and ``backward.py`` the kernels,
``arguments.py`` how tensors become kernel arguments, ``ops.py`` the registered operators. Nothing
here is imported before an operation runs on Triton.
"""
