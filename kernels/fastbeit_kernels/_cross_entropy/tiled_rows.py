"""Loss and gradient of rows of logits that are too long for registers, in two passes.

The formulas are those of ``whole_rows.py``. The first kernel goes through each row in blocks of
classes and rescales its sum of exponentials to the largest logit so far (Milakov and Gimelshein,
arXiv 1805.02867); it leaves max x and 1 / z of each row. The second writes G over the logits, a
block of classes of a piece of the rows a program, and sums it up for the bias. Logits are read
twice and written once, where one pass would read them once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._attention.tiles import exponential
from .whole_rows import piece_of, reciprocal, row_gradient, row_nats


@triton.jit
def load_logits(
    logits_ptr, bias_ptr, rows, inside, columns,
    CLASSES: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """(logits with the bias, -inf behind the last class; their addresses; which are in memory)."""
    pointers = logits_ptr + rows.to(tl.int64)[:, None] * ROW + columns[None, :]
    there = inside[:, None]
    if ROW % BLOCK != 0:
        there = there & (columns < ROW)[None, :]
    x = tl.load(pointers, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        in_memory = (columns < ROW)[None, :]
        x += tl.load(bias_ptr + columns[None, :], mask=in_memory, other=0.0).to(tl.float32)
    if CLASSES % BLOCK != 0:
        x = tl.where((columns < CLASSES)[None, :], x, float("-inf"))
    return x, pointers, there


@triton.jit
def loss_tiled_rows(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    losses_ptr,
    counts_ptr,
    scales_ptr,
    total,
    smoothing,
    CLASSES: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GRADIENT: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A piece of the rows, one after another. GRADIENT: max x and 1 / z go to ``scales [R, 2]``."""
    first, last = piece_of(total)  # pyright: ignore[reportGeneralTypeIssues]
    nats = tl.zeros([1], tl.float64)
    correct = tl.zeros([1], tl.int32)
    count = tl.zeros([1], tl.int32)
    for row in range(first, last):
        rows = row + tl.arange(0, 1)
        label = tl.load(labels_ptr + rows)
        known = (label >= 0) & (label < CLASSES)
        largest = tl.full([1], float("-inf"), tl.float32)
        z = tl.zeros([1], tl.float32)
        sums = tl.zeros([1], tl.float32)
        best = tl.full([1], CLASSES, tl.int32)
        for start in tl.range(0, CLASSES, BLOCK, num_stages=STAGES):
            columns = start + tl.arange(0, BLOCK)
            x, _, _ = load_logits(  # pyright: ignore[reportGeneralTypeIssues]
                logits_ptr, bias_ptr, rows, rows < last, columns, CLASSES, ROW, BLOCK, BIAS
            )
            block_largest = tl.max(x, 1)
            if tl.max((block_largest > largest).to(tl.int32), 0) > 0:
                # Only a larger logit moves the best class: of equals the lowest stays.
                best = tl.min(tl.where(x == block_largest[:, None], columns[None, :], CLASSES), 1)
            new = tl.maximum(largest, block_largest)
            safe = tl.where(new == float("-inf"), 0.0, new)
            z = z * exponential(largest, safe, EXACT)
            z += tl.sum(exponential(x, safe[:, None], EXACT), 1)
            largest = new
            if SMOOTHED:
                if CLASSES % BLOCK != 0:
                    x = tl.where((columns < CLASSES)[None, :], x, 0.0)
                sums += tl.sum(x, 1)
        base = logits_ptr + rows.to(tl.int64) * ROW
        x_label = tl.load(base + label, mask=known, other=0.0).to(tl.float32)
        if BIAS:
            x_label += tl.load(bias_ptr + label, mask=known, other=0.0).to(tl.float32)
        mean_gap = sums / CLASSES - largest
        loss = row_nats(z, x_label - largest, mean_gap, label, smoothing, CLASSES, SMOOTHED)
        nats += loss.to(tl.float64)
        correct += (known & (best == label) & (x_label == largest)).to(tl.int32)
        count += (label >= 0).to(tl.int32)
        if GRADIENT:
            tl.store(scales_ptr + 2 * rows.to(tl.int64), largest)
            tl.store(scales_ptr + 2 * rows.to(tl.int64) + 1, reciprocal(z, label, CLASSES))
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(losses_ptr + program, tl.sum(nats, 0).to(tl.float32))
    tl.store(counts_ptr + program, tl.sum(correct, 0))
    tl.store(counts_ptr + programs + program, tl.sum(count, 0))


@triton.jit
def gradient_tiles(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    scales_ptr,
    dbias_ptr,
    total,
    smoothing,
    pieces,
    CLASSES: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """BLOCK classes of one of ``pieces`` pieces of the rows; its sum is one partial of dbias."""
    piece = (tl.program_id(0) % pieces).to(tl.int64)
    columns = tl.program_id(0) // pieces * BLOCK + tl.arange(0, BLOCK)
    first = (piece * total // pieces).to(tl.int32)
    last = ((piece + 1) * total // pieces).to(tl.int32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < last
        label = tl.load(labels_ptr + rows, mask=inside, other=-1)
        scales = scales_ptr + 2 * rows.to(tl.int64)
        # Rows past the last: powers of zero.
        largest = tl.load(scales, mask=inside, other=float("inf"))
        inverse = tl.load(scales + 1, mask=inside, other=0.0)
        x, pointers, there = load_logits(  # pyright: ignore[reportGeneralTypeIssues]
            logits_ptr, bias_ptr, rows, inside, columns, CLASSES, ROW, BLOCK, BIAS
        )
        powers = exponential(x, largest[:, None], EXACT)
        g = row_gradient(powers, inverse, label, columns, smoothing, CLASSES, SMOOTHED)
        if BIAS_GRADIENT:
            dbias += g
        if GRADIENT:
            tl.store(pointers, g.to(logits_ptr.dtype.element_ty), mask=there)
    if BIAS_GRADIENT:
        tl.store(dbias_ptr + piece * ROW + columns, tl.sum(dbias, 0), mask=columns < ROW)
