"""The masked loss of a linear head in Triton."""
