"""Every number that the model of many GPUs rests on (``scale.py``): value, unit, kind and source.

Kinds: *published* (the source states it), *counted* (follows from the code or a specification),
*estimated* (neither; the first to replace by a measurement). None of them was measured here. The
defaults describe nodes of eight H100 SXM with one 400 Gb/s adapter each. A JSON file changes single
ones (``--scale-assumptions FILE``)::

    {"nics_per_node": 1, "nic_gb_s": 12, "image_kb": 60}

Latencies and protocols are NCCL's own: the model by which it chooses an algorithm, in
github.com/NVIDIA/nccl, src/graph/tuning.cc (NVLS, CollNet and PAT are left out).
"""

from __future__ import annotations

import json
import math
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["published", "counted", "estimated"]


def _number(value: float, unit: str, kind: Kind, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "kind": kind, "source": source})


@dataclass(frozen=True)
class Assumptions:
    """The numbers; each field's metadata holds its unit, kind and source."""

    gpus_per_node: float = _number(8, "GPUs", "published", "DGX H100 data sheet")
    peak_share: float = _number(
        0.4,
        "of peak",
        "estimated",
        "where no --images-per-s is given; the best published for width 768 is 40.6 % (llm.c's "
        "GPT-2), a ViT-B 23 %: the higher one, which leaves the network less time",
    )
    launch_ms: float = _number(
        12.0,
        "ms a micro-batch",
        "estimated",
        "its shortest time, however few its images: some 1,200 kernels at 10 µs of eager PyTorch",
    )
    overlap_slowdown: float = _number(
        0.1,
        "of compute speed",
        "estimated",
        "lost while a collective runs, whose channels hold up to 16 of 132 SMs",
    )
    hbm_gb_s: float = _number(
        3000, "GB/s", "estimated", "AdamW's; nine tenths of the data sheet's 3,350"
    )
    adamw_bytes: float = _number(
        28, "bytes a number", "counted", "fp32: reads weight, gradient, two moments, writes three"
    )
    nvlink_gb_s: float = _number(
        370,
        "GB/s a GPU",
        "published",
        "NVLink 4 in one direction, after protocol overhead: NVIDIA/nccl-tests issue 212",
    )
    nics_per_node: float = _number(8, "adapters", "published", "DGX H100 data sheet")
    nic_gb_s: float = _number(
        47, "GB/s", "published", "NDR at 400 Gb/s gives 46 to 48: NVIDIA/nccl-tests issue 290"
    )
    loader_images_s: float = _number(
        3600,
        "images/s a GPU",
        "estimated",
        "lowest of the figures in print for DALI on an A100 or H100 (3,600 to 7,000); "
        "python -m fastbeit.data.tune measures yours",
    )
    image_kb: float = _number(
        115, "KB", "counted", "ImageNet-1k's training archive, 147.9 GB, over 1,281,167 images"
    )
    storage_node_gb_s: float = _number(
        4, "GB/s a node", "estimated", "reading images; above it where memory caches them"
    )
    storage_gb_s: float = _number(
        40, "GB/s", "estimated", "reading images, all nodes together (a shared file system)"
    )
    host_copy_gb_s: float = _number(
        10, "GB/s a GPU", "estimated", "a checkpoint's copy to pageable host memory"
    )
    checkpoint_gb_s: float = _number(
        5, "GB/s", "estimated", "writing a checkpoint, all ranks together"
    )

    @property
    def network_gb_s(self) -> float:
        """GB/s that one GPU's share of its node's adapters carries."""
        return self.nics_per_node * self.nic_gb_s / self.gpus_per_node


class Protocol(NamedTuple):
    """One way of NCCL to run a collective."""

    name: str
    tree: bool
    """Along a binary tree of nodes (all-reduce only), not around a ring."""
    base_us: float
    nvlink_us: float
    """A hop inside a node."""
    network_us: float
    """A hop between nodes."""
    share: float
    """Of the links' bandwidth that the payload gets."""


# published: tuning.cc (baseLat, hwLat, and the factors on busBw). LL pays each four bytes with four
# of flags; LL128 sends 120 of 128 bytes.
PROTOCOLS = (
    Protocol("ring, LL", False, 6.6, 0.6, 2.7, 0.25),
    Protocol("ring, LL128", False, 14.0, 1.9, 4.0, 0.92),
    Protocol("ring, Simple", False, 8.4, 3.4, 14.0, 1.0),
    Protocol("tree, LL", True, 6.8, 0.6, 5.0, 0.92 / 3.8),
    Protocol("tree, LL128", True, 14.0, 1.25, 8.5, 0.92 * 0.9375),
    Protocol("tree, Simple", True, 0.0, 28.0, 28.0, 0.92),
)


COUNTS = ("gpus_per_node", "nics_per_node")


def load_assumptions(path: Path | None) -> Assumptions:
    """The defaults, with what the JSON file ``path`` gives in their place.

    Raises:
        ValueError: unreadable, an unknown name, or not a positive number (the slowdown may be 0).
    """
    if path is None:
        return Assumptions()
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--scale-assumptions {path} can't be read as JSON: {error}") from error
    known = [item.name for item in fields(Assumptions)]
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold a JSON object of numbers, got {json.dumps(given)[:60]}")
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{path}: unknown assumption {name!r}: it has {', '.join(known)}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        least = 0.0 if name == "overlap_slowdown" else math.ulp(0.0)
        if not number or not least <= value < math.inf:
            raise ValueError(f"{path}: {name} must be a positive number, got {json.dumps(value)}")
        if name in COUNTS and (value != int(value) or value < 1):
            raise ValueError(f"{path}: {name} must be a whole number, got {json.dumps(value)}")
    return replace(Assumptions(), **given)


def table(assumptions: Assumptions | None = None) -> str:
    """All of them as a Markdown table (``docs/scale.md`` holds that of the defaults)."""
    assumptions = assumptions or Assumptions()
    lines = ["| assumption | value | unit | kind | source |", "|---|---|---|---|---|"]
    for item in fields(assumptions):
        value = getattr(assumptions, item.name)
        kind, source = _kind_and_source(item, value)
        lines.append(f"| `{item.name}` | {value:g} | {item.metadata['unit']} | {kind} | {source} |")
    return "\n".join(lines)


def _kind_and_source(item: Field[Any], value: float) -> tuple[str, str]:
    if value != item.default:
        return "given", "--scale-assumptions"
    return item.metadata["kind"], item.metadata["source"]
