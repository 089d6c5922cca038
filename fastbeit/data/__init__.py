"""Data: sources of encoded images, the plan of every random decision, and the loaders.

Importing this package loads NumPy only. ``make_loader`` brings in PyTorch, PIL or DALI, so it is
imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastbeit.data.masks import MaskSpec, draw_masks, mask_positions
from fastbeit.data.order import BatchSchedule, EpochOrder
from fastbeit.data.plan import Plan, PlanSpec, draw_plan
from fastbeit.data.source import Source, open_source

if TYPE_CHECKING:
    from fastbeit.data.loader import make_loader

__all__ = [
    "BatchSchedule",
    "EpochOrder",
    "MaskSpec",
    "Plan",
    "PlanSpec",
    "Source",
    "draw_masks",
    "draw_plan",
    "make_loader",
    "mask_positions",
    "open_source",
]


def __getattr__(name: str) -> Any:
    if name == "make_loader":
        from fastbeit.data.loader import make_loader

        return make_loader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
