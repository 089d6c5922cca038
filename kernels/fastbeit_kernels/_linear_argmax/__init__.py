"""The argmax of a linear head in Triton."""
