"""The embedding of patches in Triton."""
