"""Convolutions in channels-last memory, for inference, in Triton."""
