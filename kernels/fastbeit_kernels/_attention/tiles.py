"""What the attention kernels share: loads of token rows, tiles of scores.

Shapes: q rows of queries, c columns of keys, w head width padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._products import dot

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(base, rows, stride, filled, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr):
    """Rows of ``[T, WIDTH]`` as a tile ``[rows, PADDED_WIDTH]``; zero where not filled."""
    w = tl.arange(0, PADDED_WIDTH)
    pointers = base + rows[:, None] * stride + w[None, :]
    if PADDED_WIDTH == WIDTH:
        return tl.load(pointers, mask=filled[:, None], other=0.0)
    return tl.load(pointers, mask=filled[:, None] & (w < WIDTH)[None, :], other=0.0)


@triton.jit
def load_all_rows(base, rows, stride, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr):
    """:func:`load_rows` where every row exists."""
    w = tl.arange(0, PADDED_WIDTH)
    pointers = base + rows[:, None] * stride + w[None, :]
    if PADDED_WIDTH == WIDTH:
        return tl.load(pointers)
    return tl.load(pointers, mask=(w < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, stride, filled, tile, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr):
    """The counterpart of :func:`load_rows`."""
    w = tl.arange(0, PADDED_WIDTH)
    pointers = base + rows[:, None] * stride + w[None, :]
    tile = tile.to(base.dtype.element_ty)
    if PADDED_WIDTH == WIDTH:
        tl.store(pointers, tile, mask=filled[:, None])
    else:
        tl.store(pointers, tile, mask=filled[:, None] & (w < WIDTH)[None, :])


@triton.jit
def load_keys(
    base, columns, stride, keys, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, LAST: tl.constexpr
):
    """Rows of k or v; only the last tile of keys can reach past them."""
    if LAST:
        return load_rows(base, columns, stride, columns < keys, WIDTH, PADDED_WIDTH)
    return load_all_rows(base, columns, stride, WIDTH, PADDED_WIDTH)


@triton.jit
def score_tile(
    q_qw,
    k_cw,
    bias_ptr,
    bias_rows,
    columns,
    keys,
    keys_of_8,
    scale,
    BIAS: tl.constexpr,
    LAST: tl.constexpr,
):
    """scale * q kᵀ + bias in fp32, -inf past the last key.

    Bias rows are a multiple of 8 long in memory: the mask keeps whole groups of 8, so that loads
    stay 16 bytes wide, and what the padding holds is replaced.
    """
    scores_qc = dot(q_qw, tl.trans(k_cw)) * scale
    if BIAS:
        pointers = bias_ptr + bias_rows[:, None] + columns[None, :]
        if LAST:
            there = (columns < keys_of_8 * 8)[None, :]
            scores_qc += tl.load(pointers, mask=there, other=0.0).to(tl.float32)
        else:
            scores_qc += tl.load(pointers).to(tl.float32)
    if LAST:
        scores_qc = tl.where((columns < keys)[None, :], scores_qc, float("-inf"))
    return scores_qc


@triton.jit
def exponential(x, largest, EXACT: tl.constexpr):
    """exp(x - largest), as one fused multiply-add and exp2 unless fp32 accuracy is wanted."""
    if EXACT:
        return tl.exp(x - largest)
    return tl.exp2(x * LOG2_E - largest * LOG2_E)
