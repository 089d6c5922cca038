"""What all plots share: SVG files that depend on nothing but the results."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, REFERENCE, OTHERS = "#d62728", "#9aa5b1", "#4c78a8"
BETTER, WORSE = "#4c9f70", "#d98c3f"
COLOURS = ("#4c78a8", "#d62728", "#4c9f70", "#d98c3f", "#8e6bbf", "#6b6b6b", "#c2a83e", "#3aa6b9")


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def figure(width: float = 9, height: float = 4.5) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(picture: Figure, path: Path) -> None:
    """Without a date, and with names of clip paths that follow from what they clip."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "fastbeit"}):
        picture.savefig(path, metadata={"Date": None})
