"""Sums over the programs' partial results, in a fixed order, and the last scaling of gradients.

loss, correct, count   Σ of the partials; the loss over max(count, 1)
dbias                  Σ of the partials of dbias, not scaled yet
gradient               product * dloss / max(count, 1): in fp32, rounded once, and what it is
                       scaled by stays on the device
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_partials(
    losses_ptr,
    counts_ptr,
    dbias_partials_ptr,
    loss_ptr,
    correct_ptr,
    count_ptr,
    dbias_ptr,
    programs,
    partials,
    row,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program 0 sums the loss and the counts (PROGRAMS: their number, padded); every other one
    COLUMNS of dbias, ROWS partials at a time."""
    if tl.program_id(0) == 0:
        numbers = tl.arange(0, PROGRAMS)
        there = numbers < programs
        losses = tl.load(losses_ptr + numbers, mask=there, other=0.0).to(tl.float64)
        correct = tl.sum(tl.load(counts_ptr + numbers, mask=there, other=0).to(tl.int64), 0)
        counts = tl.load(counts_ptr + programs + numbers, mask=there, other=0)
        count = tl.sum(counts.to(tl.int64), 0)
        loss = tl.sum(losses, 0) / tl.maximum(count, 1).to(tl.float64)
        tl.store(loss_ptr, loss.to(tl.float32))
        tl.store(correct_ptr, correct)
        tl.store(count_ptr, count)
    else:
        columns = (tl.program_id(0) - 1) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, partials, ROWS):
            numbers = start + tl.arange(0, ROWS)
            there = (numbers < partials)[:, None] & (columns < row)[None, :]
            offsets = numbers.to(tl.int64)[:, None] * row + columns[None, :]
            sums += tl.load(dbias_partials_ptr + offsets, mask=there, other=0.0)
        tl.store(dbias_ptr + columns, tl.sum(sums, 0), mask=columns < row)


@triton.jit
def scale_gradient(product_ptr, dloss_ptr, count_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    """out = product * dloss / max(count, 1), in out's dtype."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    factor = tl.load(dloss_ptr) / tl.maximum(tl.load(count_ptr), 1).to(tl.float32)
    scaled = tl.load(product_ptr + offsets, mask=inside, other=0.0) * factor
    tl.store(out_ptr + offsets, scaled.to(out_ptr.dtype.element_ty), mask=inside)
