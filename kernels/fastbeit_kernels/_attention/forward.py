"""Forward kernel: softmax(scale * Q Kᵀ + bias) V and the log-sum-exp of each row of scores.

A program serves one block of query rows of one head of one image. It goes through the keys block by
block and rescales what it has to each new largest score (Dao et al., arXiv 2205.14135), so it
serves any length; the last block is as narrow as the keys that are left allow (197 keys are 64 + 64
+ 64 + 16, so that 208 columns are computed and not 256). ``forward_rows.py`` is the form for few
keys that never rescales.

Shapes: q query rows of the block, c key columns of a tile, w head width padded to a power of two.
Rows without a filled slot (positions -1) and rows whose scores are all -inf give zeros; their
log-sum-exp is +inf, by which the backward kernels find probabilities of exactly zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._products import dot_add
from .tiles import exponential, load_keys, load_rows, score_tile, store_rows


@triton.jit
def query_block(positions_ptr, heads, queries, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """Which (image, head, rows) a program serves, and the bias row of each of its rows.

    Row blocks of one head of one image are neighbours, so that keys and values come from L2.
    """
    blocks = tl.cdiv(queries, ROWS)
    program = tl.program_id(0)
    image = program // (blocks * heads)
    head = program // blocks % heads
    rows = program % blocks * ROWS + tl.arange(0, ROWS)
    filled = rows < queries
    bias_rows = rows
    if POSITIONS:
        bias_rows = tl.load(positions_ptr + image.to(tl.int64) * queries + rows, filled, other=-1)
        filled = bias_rows >= 0
    return image.to(tl.int64), head, rows, filled, bias_rows


@triton.jit
def finish_rows(
    out_ptr,
    lse_ptr,
    image,
    head,
    heads,
    rows,
    queries,
    filled,
    out_qw,
    largest_q,
    total_q,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    """Divide by the sum of exponentials and store; rows without a probability become zero."""
    alive = filled & (total_q > 0)
    lse_q = tl.where(alive, largest_q + tl.log(tl.where(alive, total_q, 1.0)), float("inf"))
    out_qw = tl.where(alive[:, None], out_qw / tl.where(alive, total_q, 1.0)[:, None], 0.0)
    inside = rows < queries
    tl.store(lse_ptr + (image * heads + head) * queries + rows, lse_q, mask=inside)
    base = out_ptr + (image * queries * heads + head) * WIDTH
    store_rows(base, rows, heads * WIDTH, inside, out_qw, WIDTH, PADDED_WIDTH)


@triton.jit
def forward_step(
    q_qw,
    k_base,
    v_base,
    k_token,
    v_token,
    bias_base,
    bias_rows,
    columns,
    keys,
    keys_of_8,
    scale,
    out_qw,
    largest_q,
    total_q,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    LAST: tl.constexpr,
):
    """One block of keys: (out, largest, total) rescaled to the new largest score, and extended."""
    k_cw = load_keys(k_base, columns, k_token, keys, WIDTH, PADDED_WIDTH, LAST)
    s_qc = score_tile(q_qw, k_cw, bias_base, bias_rows, columns, keys, keys_of_8, scale, BIAS, LAST)
    new_q = tl.maximum(largest_q, tl.max(s_qc, 1))
    safe_q = tl.where(new_q == float("-inf"), 0.0, new_q)
    p_qc = exponential(s_qc, safe_q[:, None], EXACT)
    shrink_q = exponential(largest_q, safe_q, EXACT)
    v_cw = load_keys(v_base, columns, v_token, keys, WIDTH, PADDED_WIDTH, LAST)
    out_qw = dot_add(p_qc.to(v_cw.dtype), v_cw, out_qw * shrink_q[:, None])
    return out_qw, new_q, total_q * shrink_q + tl.sum(p_qc, 1)


@triton.jit
def attention_forward(
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
    TAIL: tl.constexpr,
):
    """Blocks of COLUMNS keys, then one of TAIL for the rest (TAIL 0: there is none)."""
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
    out_qw = tl.zeros([ROWS, PADDED_WIDTH], tl.float32)
    total_q = tl.zeros([ROWS], tl.float32)
    largest_q = tl.full([ROWS], float("-inf"), tl.float32)
    whole = keys // COLUMNS * COLUMNS
    for start in range(0, whole, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        out_qw, largest_q, total_q = forward_step(
            q_qw, k_base, v_base, k_token, v_token, bias_base, bias_rows, columns, keys,
            keys_of_8, scale, out_qw, largest_q, total_q, WIDTH, PADDED_WIDTH, BIAS, EXACT, False,
        )  # fmt: skip
    if TAIL > 0:
        columns = whole + tl.arange(0, TAIL)
        out_qw, largest_q, total_q = forward_step(
            q_qw, k_base, v_base, k_token, v_token, bias_base, bias_rows, columns, keys,
            keys_of_8, scale, out_qw, largest_q, total_q, WIDTH, PADDED_WIDTH, BIAS, EXACT, True,
        )  # fmt: skip
    finish_rows(
        out_ptr, lse_ptr, image, head, heads, rows, queries, filled, out_qw, largest_q, total_q,
        WIDTH, PADDED_WIDTH,
    )  # fmt: skip
