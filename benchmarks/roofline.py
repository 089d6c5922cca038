"""What an operation must compute and move at least, and how long that takes on a GPU.

Counted from the formulas: attention's forward is two products (S = QKᵀ, O = PV), its backward five
(S again, dP, dV, dQ, dK), 2·d FLOPs a pair of query and key each. Bytes are every tensor once: what
is read and written by an operation that is one perfect kernel. An implementation that recomputes or
re-reads is measured against the same floor.
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


def attention_forward(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    *,
    element_bytes: int = 2,
    bias_elements: int = 0,
) -> Work:
    """q, k, v and the bias (in the elements' precision) read; output and log-sum-exp written."""
    rows, pairs = batch * heads, batch * heads * queries * keys
    tensors = rows * width * (2 * queries + 2 * keys) * element_bytes
    moved = tensors + bias_elements * element_bytes + rows * queries * FLOAT_BYTES
    return Work(2 * 2 * width * pairs, moved)


def attention_backward(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    *,
    element_bytes: int = 2,
    bias_elements: int = 0,
) -> Work:
    """q, k, v, dO, bias and log-sum-exp read; dq, dk, dv and dBias (fp32) written."""
    rows, pairs = batch * heads, batch * heads * queries * keys
    tensors = rows * width * (3 * queries + 4 * keys) * element_bytes
    bias = bias_elements * (element_bytes + FLOAT_BYTES)
    return Work(5 * 2 * width * pairs, tensors + bias + rows * queries * FLOAT_BYTES)


def expand_forward(table_rows: int, tokens: int, heads: int) -> Work:
    """Table and index read, fp32 bias written."""
    places = tokens * tokens
    written = heads * places * FLOAT_BYTES
    return Work(0, written + places * INDEX_BYTES + table_rows * heads * FLOAT_BYTES)


def expand_backward(table_rows: int, tokens: int, heads: int) -> Work:
    """dBias read, the table's gradient written; the index is a grid's and needs no reading."""
    places = heads * tokens * tokens
    return Work(places, (places + table_rows * heads) * FLOAT_BYTES)


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
