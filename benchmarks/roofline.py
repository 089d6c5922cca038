"""What an operation must compute and move at least, and how long that takes on a GPU.

Counted from the formulas, by each operation's shapes. Bytes are every tensor once: what is read and
written by an operation that is one perfect kernel. An implementation that recomputes or re-reads is
measured against the same floor. FLOPs are those of matrix products; the arithmetic of elements
hides behind its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FLOAT_BYTES = 4
INDEX_BYTES = 8


@dataclass(frozen=True)
class Work:
    """``flops`` of the formulas and ``bytes`` between memory and chip, at least."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceiling:
    """Rates of a GPU: matrix products (TFLOP/s) and memory (TB/s), and where they come from."""

    tflops: float
    tb_per_s: float
    source: str

    def floor_ms(self, work: Work) -> float:
        """The larger of the times for the arithmetic and for the bytes."""
        return max(work.flops / self.tflops, work.bytes / self.tb_per_s) / 1e9


# Dense 16-bit TFLOP/s and TB/s of the vendors' data sheets, by a part of the name: a fall-back for
# when measuring the ceilings failed. Longer names first.
DATA_SHEET: Mapping[str, tuple[float, float]] = {
    "H100 PCIe": (756.0, 2.0),
    "H100 NVL": (835.0, 3.9),
    "H200": (989.0, 4.8),
    "H100": (989.0, 3.35),
    "A100-SXM4-80GB": (312.0, 2.04),
    "A100": (312.0, 1.56),
    "RTX 4090": (165.0, 1.01),
    "RTX 3090": (71.0, 0.94),
}


def data_sheet_ceiling(gpu: str) -> Ceiling | None:
    for name, (tflops, tb_per_s) in DATA_SHEET.items():
        if name in gpu:
            return Ceiling(tflops, tb_per_s, "data sheet")
    return None
