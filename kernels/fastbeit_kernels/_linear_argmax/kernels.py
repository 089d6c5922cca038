"""argmax over V of x Wᵀ + b: a tiled product that ends in (largest, column), and a reduction.

    best[t, r]    = max over the columns v of tile t of  Σ_d x[r, d] w[v, d] + b[v]
    column[t, r]  = the lowest v that has it
    codes[r]      = column[t, r] of the lowest t with the largest best[t, r]

Scores are fp32 from the first product on and are never written. As in ``torch.argmax``, NaN is
larger than everything and the lowest index wins among equals, so a row of -inf gives 0. Columns
past the last class are -inf behind all others: they can only tie, and ties they lose.

Shapes: r rows of a tile, v columns of a tile, d depth of a step, t tiles of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._products import INTERPRETED, dot_add

NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(scores, axis: tl.constexpr):
    """Along one axis; NaN where there is one.

    The interpreter's own maximum ignores NaN, and with ``_larger`` it takes a second a tile.
    """
    if INTERPRETED:
        some_nan = tl.max((scores != scores).to(tl.int32), axis)
        known = tl.max(tl.where(scores != scores, float("-inf"), scores), axis)
        return tl.where(some_nan > 0, float("nan"), known)
    return tl.reduce(scores, axis, _larger)


@triton.jit
def first_of_largest(scores, best, columns, axis: tl.constexpr):
    """The lowest of ``columns`` whose score is ``best``, which is NaN if any score is."""
    hit = (scores == tl.expand_dims(best, axis)) | (scores != scores)
    return tl.min(tl.where(hit, columns, NO_COLUMN), axis)


@triton.jit
def argmax_tiles(
    x_ptr,
    w_ptr,
    bias_ptr,
    best_ptr,
    column_ptr,
    x_row_8,
    w_row_8,
    rows,
    classes,
    depth_8,
    BIAS: tl.constexpr,
    WHOLE_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of scores → best, column ``[t, R]``.

    GROUP row tiles are taken through all columns before the next ones, so that what the programs
    of a moment read together stays in L2. Strides and depth come in units of 8 elements: the
    compiler knows then that it may read 16 bytes at a time.
    """
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(classes, COLUMNS)
    program = tl.program_id(0)
    first = program // (GROUP * column_tiles) * GROUP
    grouped = tl.minimum(row_tiles - first, GROUP)
    row_tile = first + program % (GROUP * column_tiles) % grouped
    column_tile = program % (GROUP * column_tiles) // grouped

    r = row_tile * ROWS + tl.arange(0, ROWS)
    v = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, DEPTH)
    # Past the ends the last row is read again, so that loads need no mask but along the depth.
    x_rows = tl.minimum(r, rows - 1).to(tl.int64) * x_row_8 * 8
    w_rows = tl.minimum(v, classes - 1).to(tl.int64) * w_row_8 * 8
    x_rd = x_ptr + x_rows[:, None] + d[None, :]
    w_dv = w_ptr + w_rows[None, :] + d[:, None]
    scores_rv = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth_8 * 8, DEPTH):
        if WHOLE_DEPTH:
            left = tl.load(x_rd + start)
            right = tl.load(w_dv + start)
        else:
            inside = d + start < depth_8 * 8
            left = tl.load(x_rd + start, mask=inside[None, :], other=0.0)
            right = tl.load(w_dv + start, mask=inside[:, None], other=0.0)
        scores_rv = dot_add(left, right, scores_rv)
    there = v < classes
    if BIAS:
        bias_v = tl.load(bias_ptr + v, mask=there, other=0.0).to(tl.float32)
        scores_rv += bias_v[None, :]
    scores_rv = tl.where(there[None, :], scores_rv, float("-inf"))
    best_r = largest(scores_rv, 1)
    column_r = first_of_largest(scores_rv, best_r, v[None, :], 1)
    place = column_tile.to(tl.int64) * rows + r
    tl.store(best_ptr + place, best_r, mask=r < rows)
    tl.store(column_ptr + place, column_r, mask=r < rows)


@triton.jit
def argmax_of_tiles(
    best_ptr, column_ptr, codes_ptr, rows, tiles, TILES: tl.constexpr, ROWS: tl.constexpr
):
    """best, column ``[t, R]`` → codes int64 ``[R]``, TILES tiles at a time."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, TILES)
    best_r = tl.full([ROWS], float("-inf"), tl.float32)
    codes_r = tl.zeros([ROWS], tl.int32)
    for start in range(0, tiles, TILES):
        there = (start + t < tiles)[:, None] & (r < rows)[None, :]
        places = (start + t).to(tl.int64)[:, None] * rows + r[None, :]
        best_tr = tl.load(best_ptr + places, mask=there, other=float("-inf"))
        column_tr = tl.load(column_ptr + places, mask=there, other=NO_COLUMN)
        new_r = largest(best_tr, 0)
        column_r = first_of_largest(best_tr, new_r, column_tr, 0)
        # Later tiles have higher columns: among equals the earlier one stays. A row of -inf stays
        # with column 0, which is its answer.
        better = (new_r > best_r) | ((new_r != new_r) & (best_r == best_r))
        best_r = tl.where(better, new_r, best_r)
        codes_r = tl.where(better, column_r, codes_r)
    tl.store(codes_ptr + r, codes_r.to(tl.int64), mask=r < rows)
