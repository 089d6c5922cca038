"""FLOPs and bytes of attention and of the table's expansion.

The forward is two products (S = QKᵀ, O = PV), the backward five (S again, dP, dV, dQ, dK), 2·d
FLOPs a pair of query and key each.
"""

from __future__ import annotations

from benchmarks.roofline import FLOAT_BYTES, INDEX_BYTES, Work


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
