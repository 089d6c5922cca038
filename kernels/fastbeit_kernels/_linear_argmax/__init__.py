"""The argmax of a linear head in Triton: scores stay in registers, two numbers a tile leave them.

``kernels.py`` holds the product with its (largest, column) ending and the reduction over tiles,
``configs.py`` their launch choices, ``ops.py`` the registered operator.
"""
