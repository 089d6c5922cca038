"""timm's and transformers' own BEiT, to compare with; skipped only where they aren't installed.

Beside a CPU-only torch they import a torchvision whose operators don't load; ``tests/conftest.py``
puts something in the place of the part that would raise.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import pytest

_BEIT_OF = {
    "timm": "timm.models.beit",
    "transformers": "transformers.models.beit.modeling_beit",
}


def peer(name: str) -> ModuleType:
    """timm or transformers, imported; skips the test if it isn't installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (it comes with the extra 'dev')")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what their own imports deprecate is not ours to mend
        importlib.import_module(_BEIT_OF[name])
        return importlib.import_module(name)
