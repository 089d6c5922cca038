"""Masked rows of the hidden states: gathered into one matrix, and their gradient scattered back.

    gather    rows[b M + m] = hidden[b, positions[b, m]], zero where the slot is empty
    scatter   dhidden[b, t] = factor * Σ product[b M + m] over the slots m that name t, m ascending

A slot is empty where its position or its target is negative. The gather also writes down what
later kernels need to know of each slot: ``labels`` (the target, V if it is V or more, -1 if the
slot is empty) and ``sources`` (the row of hidden, -1 if the slot is empty). A position that no row
has gives a row of NaN: nothing is read or written out of bounds, and nobody takes the loss for a
good one.

Nothing is scattered with atomics: a program owns rows of the result and looks through the slots.

Shapes: B images, T rows of hidden each, M slots each, D width, V classes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_rows(
    hidden_ptr,
    positions_ptr,
    targets_ptr,
    rows_ptr,
    labels_ptr,
    sources_ptr,
    hidden_image,
    hidden_row,
    hidden_column,
    positions_image,
    positions_slot,
    targets_image,
    targets_slot,
    tokens,
    slots,
    total,
    classes,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """ROWS slots, counted over all images, COLUMNS of the width at a time."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < total
    image = (rows // slots).to(tl.int64)
    slot = (rows % slots).to(tl.int64)
    source = slot
    filled = inside
    if POSITIONS:
        position = positions_ptr + image * positions_image + slot * positions_slot
        source = tl.load(position, mask=inside, other=0).to(tl.int64)
        filled = inside & (source >= 0)
    # Behind an empty slot the target is not even read.
    target = targets_ptr + image * targets_image + slot * targets_slot
    target = tl.load(target, mask=filled, other=0).to(tl.int64)
    filled = filled & (target >= 0)
    label = tl.where(filled, tl.minimum(target, classes), -1)
    tl.store(labels_ptr + rows, label.to(tl.int32), mask=inside)
    kept = tl.where(filled, tl.minimum(source, tokens), -1)
    tl.store(sources_ptr + rows, kept.to(tl.int32), mask=inside)
    there = filled & (source < tokens)
    missing = filled & (source >= tokens)
    nothing = tl.where(missing, float("nan"), 0.0).to(rows_ptr.dtype.element_ty)[:, None]
    base = hidden_ptr + image * hidden_image + tl.where(there, source, 0) * hidden_row
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        pointers = base[:, None] + columns[None, :] * hidden_column
        read = there[:, None]
        written = inside[:, None]
        if WIDTH % COLUMNS != 0:
            read = read & (columns < WIDTH)[None, :]
            written = written & (columns < WIDTH)[None, :]
        tile = tl.where(there[:, None], tl.load(pointers, mask=read, other=0.0), nothing)
        target_rows = rows_ptr + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        tl.store(target_rows, tile, mask=written)


@triton.jit
def scatter_rows(
    product_ptr,
    sources_ptr,
    dloss_ptr,
    count_ptr,
    dhidden_ptr,
    tokens,
    slots,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """ROWS rows of one image's gradient, from all its slots, SLOTS of them at a time.

    A row that several slots name takes a round for each; most blocks of rows are done in one.
    """
    blocks = tl.cdiv(tokens, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    factor = tl.load(dloss_ptr) / tl.maximum(tl.load(count_ptr), 1).to(tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        narrow = columns < WIDTH
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, slots, SLOTS):
            numbers = begin + tl.arange(0, SLOTS)
            pointers = sources_ptr + image * slots + numbers
            source = tl.load(pointers, mask=numbers < slots, other=-1)
            named = source[None, :] == rows[:, None]
            rounds = tl.max(tl.sum(named.to(tl.int32), 1), 0)
            taken = tl.full([ROWS], -1, tl.int32)
            for _ in range(rounds):
                left = named & (numbers[None, :] > taken[:, None])
                taken = tl.min(tl.where(left, numbers[None, :], slots), 1)
                found = (taken < slots)[:, None]
                if WIDTH % COLUMNS != 0:
                    found = found & narrow[None, :]
                offsets = (image * slots + taken)[:, None] * WIDTH + columns[None, :]
                sums += tl.load(product_ptr + offsets, mask=found, other=0.0)
        written = (rows < tokens)[:, None]
        if WIDTH % COLUMNS != 0:
            written = written & narrow[None, :]
        offsets = (image * tokens + rows)[:, None] * WIDTH + columns[None, :]
        result = (sums * factor).to(dhidden_ptr.dtype.element_ty)
        tl.store(dhidden_ptr + offsets, result, mask=written)
