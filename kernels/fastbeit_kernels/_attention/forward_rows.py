"""Forward kernel that holds whole rows of scores in registers: one softmax, nothing is rescaled.

Keys are one to three tiles of COLUMNS and a last, narrow one of TAIL (197 keys: 64 + 64 + 64 + 16,
so that 208 columns are computed and not 256). Row maxima are taken of the tiles' elementwise
maximum, and row sums of their elementwise sum: one reduction each for all whole tiles, and only the
last tile's, whose layout is another one, has to be brought to theirs.

Against ``forward.py`` at 197 keys on sm_90: 1,800 instructions a warp for 2,234, in 196 registers a
thread for 117, and loads that nothing overlaps but the other warps. Which is faster, only a GPU can
say; ``_configs.py`` chooses.

Shapes: q query rows of the block, c key columns of a tile, w head width padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._products import dot_add
from .forward import finish_rows, query_block
from .tiles import exponential, load_keys, load_rows, score_tile


@triton.jit
def scores_of(
    q_qw,
    k_base,
    k_token,
    bias_base,
    bias_rows,
    columns,
    keys,
    keys_of_8,
    scale,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    LAST: tl.constexpr,
):
    k_cw = load_keys(k_base, columns, k_token, keys, WIDTH, PADDED_WIDTH, LAST)
    return score_tile(q_qw, k_cw, bias_base, bias_rows, columns, keys, keys_of_8, scale, BIAS, LAST)


@triton.jit
def add_values(
    p_qc,
    v_base,
    v_token,
    columns,
    keys,
    out_qw,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    LAST: tl.constexpr,
):
    """out + P V over one tile of keys."""
    v_cw = load_keys(v_base, columns, v_token, keys, WIDTH, PADDED_WIDTH, LAST)
    return dot_add(p_qc.to(v_cw.dtype), v_cw, out_qw)


@triton.jit
def attention_forward_rows(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    positions_ptr,
    out_ptr,
    lse_ptr,
    q_image,
    q_token,
    q_head,
    k_image,
    k_token,
    k_head,
    v_image,
    v_token,
    v_head,
    bias_image_8,
    bias_head_8,
    bias_row_8,
    heads,
    queries,
    keys,
    scale,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    POSITIONS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """BLOCKS tiles of COLUMNS keys (1 to 3), then one of TAIL for the rest (TAIL 0: there is none).

    Each tile has a name of its own: Triton holds no list of tiles.
    """
    image, head, rows, filled, bias_rows = query_block(  # pyright: ignore[reportGeneralTypeIssues]
        positions_ptr, heads, queries, ROWS, POSITIONS
    )
    k_base = k_ptr + image * k_image + head * k_head
    v_base = v_ptr + image * v_image + head * v_head
    bias_base = bias_ptr + (image * bias_image_8 + head * bias_head_8) * 8
    bias_rows = tl.where(filled, bias_rows, 0) * bias_row_8 * 8
    q_base = q_ptr + image * q_image + head * q_head
    q_qw = load_rows(q_base, rows, q_token, filled, WIDTH, PADDED_WIDTH)
    keys_of_8 = tl.cdiv(keys, 8)
    first = tl.arange(0, COLUMNS)
    second, third = COLUMNS + first, 2 * COLUMNS + first
    last = BLOCKS * COLUMNS + tl.arange(0, TAIL if TAIL > 0 else COLUMNS)

    s0_qc = scores_of(
        q_qw, k_base, k_token, bias_base, bias_rows, first, keys, keys_of_8, scale,
        WIDTH, PADDED_WIDTH, BIAS, False,
    )  # fmt: skip
    largest_qc = s0_qc
    if BLOCKS > 1:
        s1_qc = scores_of(
            q_qw, k_base, k_token, bias_base, bias_rows, second, keys, keys_of_8, scale,
            WIDTH, PADDED_WIDTH, BIAS, False,
        )  # fmt: skip
        largest_qc = tl.maximum(largest_qc, s1_qc)
    if BLOCKS > 2:
        s2_qc = scores_of(
            q_qw, k_base, k_token, bias_base, bias_rows, third, keys, keys_of_8, scale,
            WIDTH, PADDED_WIDTH, BIAS, False,
        )  # fmt: skip
        largest_qc = tl.maximum(largest_qc, s2_qc)
    largest_q = tl.max(largest_qc, 1)
    if TAIL > 0:
        tail_qc = scores_of(
            q_qw, k_base, k_token, bias_base, bias_rows, last, keys, keys_of_8, scale,
            WIDTH, PADDED_WIDTH, BIAS, True,
        )  # fmt: skip
        largest_q = tl.maximum(largest_q, tl.max(tail_qc, 1))
    safe_q = tl.where(largest_q == float("-inf"), 0.0, largest_q)

    s0_qc = exponential(s0_qc, safe_q[:, None], EXACT)
    total_qc = s0_qc
    if BLOCKS > 1:
        s1_qc = exponential(s1_qc, safe_q[:, None], EXACT)
        total_qc += s1_qc
    if BLOCKS > 2:
        s2_qc = exponential(s2_qc, safe_q[:, None], EXACT)
        total_qc += s2_qc
    total_q = tl.sum(total_qc, 1)
    if TAIL > 0:
        tail_qc = exponential(tail_qc, safe_q[:, None], EXACT)
        total_q += tl.sum(tail_qc, 1)

    out_qw = tl.zeros([ROWS, PADDED_WIDTH], tl.float32)
    out_qw = add_values(
        s0_qc, v_base, v_token, first, keys, out_qw, WIDTH, PADDED_WIDTH, False
    )  # fmt: skip
    if BLOCKS > 1:
        out_qw = add_values(
            s1_qc, v_base, v_token, second, keys, out_qw, WIDTH, PADDED_WIDTH, False
        )  # fmt: skip
    if BLOCKS > 2:
        out_qw = add_values(
            s2_qc, v_base, v_token, third, keys, out_qw, WIDTH, PADDED_WIDTH, False
        )  # fmt: skip
    if TAIL > 0:
        out_qw = add_values(tail_qc, v_base, v_token, last, keys, out_qw, WIDTH, PADDED_WIDTH, True)
    finish_rows(
        out_ptr, lse_ptr, image, head, heads, rows, queries, filled, out_qw, largest_q, total_q,
        WIDTH, PADDED_WIDTH,
    )  # fmt: skip
