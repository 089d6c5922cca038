"""Loss and gradient of whole rows of logits in one pass: read once, written once, in place.

With logits x = X Wᵀ + b of a row and its label t, z = Σ exp(x - max x), s the label smoothing:

    nats     log z - (1 - s) (x[t] - max x) - s (mean x - max x)
    G        exp(x - max x) / z - (1 - s) [v = t] - s / V; not divided by the number of rows yet
    dbias    Σ G over the rows, before G is rounded

A row lies in registers. The bias is added here, in fp32, to what the product left in the inputs'
precision. A program goes through a fixed piece of the rows, one tile after another, and keeps its
own sums; ``sums.py`` adds them up in order. The logits' rows are ROW long in memory, V rounded up
to 8, so that threads take 16 bytes at a time for every V; what stands behind V is never used.

Empty slots (label -1) give zeros. A label of V or more, which no class has, gives NaN: in the loss
and in the row's gradient.

H100, V = 8192: memory lets a multiprocessor have a row every 1.4 µs (32 KB at 3 TB/s over 132 of
them), 2,500 cycles at 1.75 GHz. The loop is 552 instructions of 8 warps for a row, 158 more where
the label's logit is the largest: 1,100 cycles of its four schedulers. Two blocks share a
multiprocessor, so that one loads while the other computes (counted from compiled code, not
measured yet).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._attention.tiles import exponential

GROUP = tl.constexpr(8)


@triton.jit
def piece_of(total):
    """[first, last) of the rows that this program serves; sizes differ by one at most."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    first = (program * total // programs).to(tl.int32)
    return first, ((program + 1) * total // programs).to(tl.int32)


@triton.jit
def places(columns, label):
    """Each column's place in its group of 8, and where the row's label is if counted from there.

    A column is the label where the two are equal, and before it where the first is less. The first
    is a constant of the code, as a thread reads whole groups, and the second a number for each
    group; plain numbers of columns Triton 3.9.0 keeps through the loop, 32 of them, and spills.
    """
    first = (columns // GROUP * GROUP)[None, :]
    return (columns % GROUP)[None, :], label[:, None] - first


@triton.jit
def reciprocal(z, label, CLASSES: tl.constexpr):
    """1 / z of a filled slot, 0 of an empty one, NaN where the label is no class."""
    inverse = tl.where(label >= 0, 1.0 / z, 0.0)
    return tl.where(label < CLASSES, inverse, float("nan"))


@triton.jit
def row_nats(
    z, target_gap, mean_gap, label, smoothing, CLASSES: tl.constexpr, SMOOTHED: tl.constexpr
):
    """The loss of rows; gaps are logits less the largest."""
    gap = target_gap
    if SMOOTHED:
        gap = (1.0 - smoothing) * target_gap + smoothing * mean_gap
    nats = tl.where(label < CLASSES, tl.log(z) - gap, float("nan"))
    return tl.where(label >= 0, nats, 0.0)


@triton.jit
def row_gradient(
    powers, inverse, label, columns, smoothing, CLASSES: tl.constexpr, SMOOTHED: tl.constexpr
):
    """G of a tile, from its exp(x - max x), [rows, columns]."""
    other = tl.zeros_like(inverse)
    own = other + 1.0
    if SMOOTHED:
        other = tl.where(label >= 0, smoothing / CLASSES, 0.0)
        own = (1.0 - smoothing) + other
    place, label_place = places(columns, label)  # pyright: ignore[reportGeneralTypeIssues]
    subtracted = tl.where(place == label_place, own[:, None], other[:, None])
    return powers * inverse[:, None] - subtracted


@triton.jit
def loss_whole_rows(
    logits_ptr,
    logit_ptr,
    bias_ptr,
    labels_ptr,
    losses_ptr,
    counts_ptr,
    dbias_ptr,
    total,
    smoothing,
    CLASSES: tl.constexpr,
    PADDED: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """ROWS rows at a time, padded to PADDED columns. GRADIENT: G replaces the logits.

    ``logit_ptr`` is ``logits_ptr`` once more, for single elements.
    """
    first, last = piece_of(total)  # pyright: ignore[reportGeneralTypeIssues]
    columns = tl.arange(0, PADDED)
    nats = tl.zeros([ROWS], tl.float64)
    correct = tl.zeros([ROWS], tl.int32)
    count = tl.zeros([ROWS], tl.int32)
    dbias = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < last
        label = tl.load(labels_ptr + rows, mask=inside, other=-1)
        known = (label >= 0) & (label < CLASSES)
        offsets = rows.to(tl.int64) * ROW
        pointers = logits_ptr + offsets[:, None] + columns[None, :]
        there = inside[:, None]
        if PADDED != ROW:
            there = there & (columns < ROW)[None, :]
        x = tl.load(pointers, mask=there, other=0.0).to(tl.float32)
        # The label's own logit, read before anything is written over it.
        x_label = tl.load(logit_ptr + offsets + label, mask=known, other=0.0).to(tl.float32)
        if BIAS:
            # From the first-level cache each time: registers are what decides how much runs.
            in_memory = (columns < ROW)[None, :]
            x += tl.load(bias_ptr + columns[None, :], mask=in_memory, other=0.0).to(tl.float32)
            x_label += tl.load(bias_ptr + label, mask=known, other=0.0).to(tl.float32)
        if PADDED != CLASSES:
            x = tl.where((columns < CLASSES)[None, :], x, float("-inf"))
        largest = tl.max(x, 1)
        right = known & (x_label == largest)
        if tl.max(right.to(tl.int32), 0) > 0:
            # Does a lower class have the same logit? Few rows need to look: worth a branch.
            place, label_place = places(columns, label)  # pyright: ignore[reportGeneralTypeIssues]
            equal = (x == largest[:, None]) & (place < label_place)
            right = right & (tl.max(equal.to(tl.int32), 1) == 0)
        correct += right.to(tl.int32)
        mean_gap = largest
        if SMOOTHED:
            gaps = x - largest[:, None]
            if PADDED != CLASSES:
                gaps = tl.where((columns < CLASSES)[None, :], gaps, 0.0)
            mean_gap = tl.sum(gaps, 1) / CLASSES
        powers = exponential(x, largest[:, None], EXACT)
        z = tl.sum(powers, 1)
        loss = row_nats(z, x_label - largest, mean_gap, label, smoothing, CLASSES, SMOOTHED)
        nats += loss.to(tl.float64)
        count += (label >= 0).to(tl.int32)
        if GRADIENT or BIAS_GRADIENT:
            inverse = reciprocal(z, label, CLASSES)
            g = row_gradient(powers, inverse, label, columns, smoothing, CLASSES, SMOOTHED)
            if BIAS_GRADIENT:
                dbias += g
            if GRADIENT:
                # Another thread may still have to read the label's logit.
                tl.debug_barrier()
                tl.store(pointers, g.to(logits_ptr.dtype.element_ty), mask=there)
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(losses_ptr + program, tl.sum(nats, 0).to(tl.float32))
    tl.store(counts_ptr + program, tl.sum(correct, 0))
    tl.store(counts_ptr + programs + program, tl.sum(count, 0))
    if BIAS_GRADIENT:
        pointers = dbias_ptr + program.to(tl.int64) * ROW + columns
        tl.store(pointers, tl.sum(dbias, 0), mask=columns < ROW)
