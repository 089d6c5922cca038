"""The embedding of patches in Triton.

``order.py`` lists the tokens, those of visible patches first; ``forward.py`` projects them and
writes all tokens; ``backward.py`` holds the gradients of the parameters. ``geometry.py`` says where
a patch's pixels lie, ``configs.py`` the launch choices, ``arguments.py`` how tensors become kernel
arguments, ``ops.py`` the registered operators.
"""
