"""Residual, LayerScale, DropPath and LayerNorm in Triton."""
