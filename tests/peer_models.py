"""timm's and transformers' own BEiT, to compare with; skipped only where they aren't installed.

A torchvision built for another PyTorch can't load its C++ operators, and its Python half then fails
on import for want of three operator names. Neither peer uses them on BEiT, so here the names are
declared, without code, where they are missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import pytest
import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
    "int pooled_width, int sampling_ratio, bool aligned) -> Tensor",
)
_BEIT_OF = {
    "timm": "timm.models.beit",
    "transformers": "transformers.models.beit.modeling_beit",
}
_declared: list[torch.library.Library] = []  # a Library's names last as long as the object


def _declare_torchvision_operators() -> None:
    if _declared:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision.extension

            if torchvision.extension._has_ops():
                return
        except (ImportError, RuntimeError):
            pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        name = schema.split("(")[0]
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _declared.append(library)


def peer(name: str) -> ModuleType:
    """timm or transformers, imported; skips the test if it isn't installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (it comes with the extra 'dev')")
    _declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what their own imports deprecate is not ours to mend
        importlib.import_module(_BEIT_OF[name])
        return importlib.import_module(name)
