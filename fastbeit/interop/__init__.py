"""Weights in the official, timm's and transformers' layouts, both ways.

``python -m fastbeit.interop SRC DST --to hf|timm|official`` converts a file and proves the copy.
"""

from fastbeit.interop.files import WeightsError, read_tensors
from fastbeit.interop.saving import SaveReport, save_weights
from fastbeit.interop.weights import LoadReport, load_weights

__all__ = [
    "LoadReport",
    "SaveReport",
    "WeightsError",
    "load_weights",
    "read_tensors",
    "save_weights",
]
