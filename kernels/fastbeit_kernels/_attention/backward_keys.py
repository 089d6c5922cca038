"""Backward kernel of the keys: dK, dV and dBias; the formulas are in ``backward_queries.py``.

It computes Sᵀ = K Qᵀ itself: a product whose left side is the transpose of a cast product is
miscompiled on Hopper by Triton up to 3.7.0 (fla#826).

dBias is a sum over images. A program owns one block of keys of one head, goes through its share of
the images in order and adds to a private fp32 slice of dBias that stays in L2 meanwhile; the slices
are then summed in order (``bias_gradient_sum``). Which images share a slice is fixed by the batch
size and the configuration, so gradients are bitwise repeatable. No atomics.

Shapes: q query rows of a block, c key columns of a block, w head width padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._products import dot, dot_add
from .tiles import exponential, load_rows, store_rows


@triton.jit
def add_to_bias_gradient(
    slice_ptr, dbias_row, bias_rows, filled, columns, there, held_cq, ds_cq, POSITIONS: tl.constexpr
):
    """Write held + dS into this program's slice of dBias.

    Under positions, a tile may name a bias row twice. Each thread would then write its own sum and
    one would be lost, so such a tile is added row by row.
    """
    pointers = slice_ptr + bias_rows[None, :] * dbias_row + columns[:, None]
    if POSITIONS:
        same = (bias_rows[:, None] == bias_rows[None, :]) & filled[:, None] & filled[None, :]
        if tl.sum(same.to(tl.int32)) > tl.sum(filled.to(tl.int32)):
            order = tl.arange(0, bias_rows.shape[0])
            for row in range(bias_rows.shape[0]):
                position = tl.sum(tl.where((order == row) & filled, bias_rows + 1, 0)) - 1
                ds_c = tl.sum(tl.where((order == row)[None, :], ds_cq, 0.0), 1)
                alone = tl.sum(tl.where((order == row)[None, :], there.to(tl.int32), 0), 1) > 0
                target = slice_ptr + position * dbias_row + columns
                tl.debug_barrier()
                tl.store(target, tl.load(target, mask=alone, other=0.0) + ds_c, mask=alone)
        else:
            tl.store(pointers, held_cq + ds_cq, mask=there)
    else:
        tl.store(pointers, held_cq + ds_cq, mask=there)


@triton.jit
def attention_backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    positions_ptr,
    lse_ptr,
    delta_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    dbias_ptr,
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
    dkv_image,
    dkv_token,
    dkv_head,
    bias_image_8,
    bias_head_8,
    bias_row_8,
    bias_rows_all,
    batch,
    slices,
    heads,
    queries,
    keys,
    scale,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    POSITIONS: tl.constexpr,
    EXACT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dK and dV of one block of keys of one head, image after image, and their part of dBias."""
    blocks = tl.cdiv(keys, COLUMNS)
    program = tl.program_id(0)
    share = program // (blocks * heads)
    head = program // blocks % heads
    columns = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    column_there = columns < keys
    keys_of_8 = tl.cdiv(keys, 8)
    dbias_row = keys_of_8 * 8
    # Padding columns are written too (with zeros), so that stores stay 16 bytes wide.
    column_in_memory = columns < dbias_row
    slice_ptr = dbias_ptr + (share.to(tl.int64) * heads + head) * bias_rows_all * dbias_row
    if BIAS_GRADIENT and POSITIONS:
        # Rows that no position names stay zero, so there is no first image that could write them.
        for start in range(0, bias_rows_all, ROWS):
            clear = start + tl.arange(0, ROWS)
            pointers = slice_ptr + clear[None, :] * dbias_row + columns[:, None]
            inside = (clear < bias_rows_all)[None, :] & column_in_memory[:, None]
            tl.store(pointers, tl.zeros([COLUMNS, ROWS], tl.float32), mask=inside)
        tl.debug_barrier()
    first = share * batch // slices
    images = (share + 1) * batch // slices - first
    for number in range(images):
        image = first.to(tl.int64) + number
        k_base = k_ptr + image * k_image + head * k_head
        v_base = v_ptr + image * v_image + head * v_head
        k_cw = load_rows(k_base, columns, k_token, column_there, WIDTH, PADDED_WIDTH)
        v_cw = load_rows(v_base, columns, v_token, column_there, WIDTH, PADDED_WIDTH)
        q_base = q_ptr + image * q_image + head * q_head
        dout_base = dout_ptr + image * dout_image + head * dout_head
        bias_base = bias_ptr + (image * bias_image_8 + head * bias_head_8) * 8
        row_base = (image * heads + head) * queries
        dk_cw = tl.zeros([COLUMNS, PADDED_WIDTH], tl.float32)
        dv_cw = tl.zeros([COLUMNS, PADDED_WIDTH], tl.float32)
        for start in range(0, queries, ROWS):
            rows = start + tl.arange(0, ROWS)
            filled = rows < queries
            bias_rows = rows
            if POSITIONS:
                bias_rows = tl.load(positions_ptr + image * queries + rows, filled, other=-1)
                filled = bias_rows >= 0
            there = column_in_memory[:, None] & filled[None, :]
            if BIAS_GRADIENT:
                # Read long before it is needed: it comes from L2. The first image finds nothing.
                held = there
                if not POSITIONS:
                    held = there & (number > 0)
                pointers = slice_ptr + bias_rows[None, :] * dbias_row + columns[:, None]
                held_cq = tl.load(pointers, mask=held, other=0.0)
            q_qw = load_rows(q_base, rows, q_token, filled, WIDTH, PADDED_WIDTH)
            lse_q = tl.load(lse_ptr + row_base + rows, mask=filled, other=float("inf"))
            s_cq = dot(k_cw, tl.trans(q_qw)) * scale
            if BIAS:
                pointers = bias_base + bias_rows[None, :] * bias_row_8 * 8 + columns[:, None]
                s_cq += tl.load(pointers, mask=there, other=0.0).to(tl.float32)
            # Without this, whatever the bias's padding holds would reach dBias.
            s_cq = tl.where(column_there[:, None], s_cq, float("-inf"))
            p_cq = exponential(s_cq, lse_q[None, :], EXACT)
            dout_qw = load_rows(dout_base, rows, dout_token, filled, WIDTH, PADDED_WIDTH)
            dv_cw = dot_add(p_cq.to(dout_qw.dtype), dout_qw, dv_cw)
            delta_q = tl.load(delta_ptr + row_base + rows, mask=filled, other=0.0)
            ds_cq = p_cq * (dot(v_cw, tl.trans(dout_qw)) - delta_q[None, :])
            dk_cw = dot_add(ds_cq.to(q_qw.dtype), q_qw, dk_cw)
            if BIAS_GRADIENT:
                add_to_bias_gradient(
                    slice_ptr, dbias_row, bias_rows, filled, columns, there, held_cq, ds_cq,
                    POSITIONS,
                )  # fmt: skip
                if POSITIONS:
                    # The next tile may name the same bias rows, held by other threads.
                    tl.debug_barrier()
        dk_base = dk_ptr + image * dkv_image + head * dkv_head
        dv_base = dv_ptr + image * dkv_image + head * dkv_head
        store_rows(dk_base, columns, dkv_token, column_there, dk_cw * scale, WIDTH, PADDED_WIDTH)
        store_rows(dv_base, columns, dkv_token, column_there, dv_cw, WIDTH, PADDED_WIDTH)
        if BIAS_GRADIENT:
            # What this image added is what the next one reads, by other threads perhaps.
            tl.debug_barrier()


@triton.jit
def bias_gradient_sum(slices_ptr, dbias_ptr, elements, slices, BLOCK: tl.constexpr):
    """dBias = slice 0 + slice 1 + ..., in that order; each slice has ``elements`` numbers."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(slices):
        total += tl.load(slices_ptr + offsets, mask=inside, other=0.0)
        slices_ptr += elements
    tl.store(dbias_ptr + offsets, total, mask=inside)
