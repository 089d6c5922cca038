"""Backward kernel of the queries. With P = exp(scores - lse), dP = dO Vᵀ and δ = rowsum(O ∘ dO):

    dS = P ∘ (dP - δ)     dQ = scale * dS K     dK = scale * dSᵀ Q     dV = Pᵀ dO     dBias = dS

``attention_backward_queries`` gives dQ. It computes δ on its way and stores it for the kernel of
the keys (``backward_keys.py``), so that no third kernel has to read O and dO.

Shapes: q query rows of a block, c key columns of a block, w head width padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._products import dot, dot_add
from .forward import query_block
from .tiles import exponential, load_keys, load_rows, score_tile, store_rows


@triton.jit
def query_gradient_step(
    q_qw,
    dout_qw,
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
    lse_q,
    delta_q,
    dq_qw,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    LAST: tl.constexpr,
):
    """dq + dS K over one block of keys."""
    k_cw = load_keys(k_base, columns, k_token, keys, WIDTH, PADDED_WIDTH, LAST)
    v_cw = load_keys(v_base, columns, v_token, keys, WIDTH, PADDED_WIDTH, LAST)
    s_qc = score_tile(q_qw, k_cw, bias_base, bias_rows, columns, keys, keys_of_8, scale, BIAS, LAST)
    p_qc = exponential(s_qc, lse_q[:, None], EXACT)
    ds_qc = p_qc * (dot(dout_qw, tl.trans(v_cw)) - delta_q[:, None])
    return dot_add(ds_qc.to(k_cw.dtype), k_cw, dq_qw)


@triton.jit
def attention_backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    positions_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    dq_ptr,
    delta_ptr,
    q_image,
    q_token,
    q_head,
    k_image,
    k_token,
    k_head,
    v_image,
    v_token,
    v_head,
    dout_image,
    dout_token,
    dout_head,
    dq_image,
    dq_token,
    dq_head,
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
    """dQ and δ of one block of query rows of one head of one image."""
    image, head, rows, filled, bias_rows = query_block(  # pyright: ignore[reportGeneralTypeIssues]
        positions_ptr, heads, queries, ROWS, POSITIONS
    )
    k_base = k_ptr + image * k_image + head * k_head
    v_base = v_ptr + image * v_image + head * v_head
    bias_base = bias_ptr + (image * bias_image_8 + head * bias_head_8) * 8
    bias_rows = tl.where(filled, bias_rows, 0) * bias_row_8 * 8
    dout_base = dout_ptr + image * dout_image + head * dout_head
    dout_qw = load_rows(dout_base, rows, dout_token, filled, WIDTH, PADDED_WIDTH)
    out_base = out_ptr + (image * queries * heads + head) * WIDTH
    out_qw = load_rows(out_base, rows, heads * WIDTH, filled, WIDTH, PADDED_WIDTH)
    delta_q = tl.sum(out_qw.to(tl.float32) * dout_qw.to(tl.float32), 1)
    row_base = (image * heads + head) * queries
    lse_q = tl.load(lse_ptr + row_base + rows, mask=filled, other=float("inf"))
    tl.store(delta_ptr + row_base + rows, delta_q, mask=rows < queries)
    q_base = q_ptr + image * q_image + head * q_head
    q_qw = load_rows(q_base, rows, q_token, filled, WIDTH, PADDED_WIDTH)
    keys_of_8 = tl.cdiv(keys, 8)
    dq_qw = tl.zeros([ROWS, PADDED_WIDTH], tl.float32)
    whole = keys // COLUMNS * COLUMNS
    for start in range(0, whole, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        dq_qw = query_gradient_step(
            q_qw, dout_qw, k_base, v_base, k_token, v_token, bias_base, bias_rows, columns,
            keys, keys_of_8, scale, lse_q, delta_q, dq_qw, WIDTH, PADDED_WIDTH, BIAS, EXACT, False,
        )  # fmt: skip
    if TAIL > 0:
        columns = whole + tl.arange(0, TAIL)
        dq_qw = query_gradient_step(
            q_qw, dout_qw, k_base, v_base, k_token, v_token, bias_base, bias_rows, columns,
            keys, keys_of_8, scale, lse_q, delta_q, dq_qw, WIDTH, PADDED_WIDTH, BIAS, EXACT, True,
        )  # fmt: skip
    dq_base = dq_ptr + image * dq_image + head * dq_head
    store_rows(dq_base, rows, dq_token, rows < queries, dq_qw * scale, WIDTH, PADDED_WIDTH)
