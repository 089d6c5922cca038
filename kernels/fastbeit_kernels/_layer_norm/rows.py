"""What the row kernels share: which rows a tile has, and arithmetic on rows that lie in pieces.

A row of WIDTH elements lies in PIECES pieces of COLUMNS elements (``configs.row_tile``), so that a
width such as 768 = 3 x 256 wastes no lane of a block that must be a power of two wide; a tile has
ROWS rows. Shapes: r rows of the tile, c columns of a piece. A name that ends in ``_rc`` is a tuple
of PIECES tiles [r, c] in fp32, one that ends in ``_r`` has a number for each row.
"""

# Triton's functions have no types, and its tuples grow by + alone.
# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_rows(tile, total, tokens, ROWS: tl.constexpr):
    """The rows of a tile, which of them exist, and the image and the token that each is."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    return rows, rows < total, (rows // tokens).to(tl.int64), (rows % tokens).to(tl.int64)


@triton.jit
def piece_mask(
    inside_r, piece: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """Which elements of a piece exist; only the last piece can reach past the width."""
    mask = tl.broadcast_to(inside_r[:, None], [ROWS, COLUMNS])
    if (piece + 1) * COLUMNS > WIDTH:
        mask = mask & (piece * COLUMNS + tl.arange(0, COLUMNS) < WIDTH)[None, :]
    return mask


@triton.jit
def load_rows(
    base,
    starts_r,
    inside_r,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Rows that begin at ``base + starts``; zero where there is no element."""
    loaded_rc = ()
    for piece in tl.static_range(PIECES):
        columns = piece * COLUMNS + tl.arange(0, COLUMNS)
        pointers = base + starts_r[:, None] + columns[None, :]
        mask = piece_mask(inside_r, piece, ROWS, WIDTH, COLUMNS)
        loaded_rc = loaded_rc + (tl.load(pointers, mask=mask, other=0.0).to(tl.float32),)
    return loaded_rc


@triton.jit
def load_vector(
    base, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr
):
    """A vector [WIDTH] beside every row of the tile.

    Each thread loads its own columns, from L1 where another warp has been: a vector loaded once
    would come to the other warps through shared memory and two barriers.
    """
    loaded_rc = ()
    for piece in tl.static_range(PIECES):
        columns = piece * COLUMNS + tl.arange(0, COLUMNS)
        pointers = tl.broadcast_to((base + columns)[None, :], [ROWS, COLUMNS])
        if (piece + 1) * COLUMNS > WIDTH:
            mask = tl.broadcast_to((columns < WIDTH)[None, :], [ROWS, COLUMNS])
            values = tl.load(pointers, mask=mask, other=0.0)
        else:
            values = tl.load(pointers)
        loaded_rc = loaded_rc + (values.to(tl.float32),)
    return loaded_rc


@triton.jit
def store_rows(
    base,
    starts_r,
    inside_r,
    values_rc,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The counterpart of :func:`load_rows`; rounds to the memory's dtype."""
    for piece in tl.static_range(PIECES):
        columns = piece * COLUMNS + tl.arange(0, COLUMNS)
        pointers = base + starts_r[:, None] + columns[None, :]
        mask = piece_mask(inside_r, piece, ROWS, WIDTH, COLUMNS)
        tl.store(pointers, values_rc[piece].to(base.dtype.element_ty), mask=mask)


@triton.jit
def zero_rows(ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    zeros_rc = ()
    for _ in tl.static_range(PIECES):
        zeros_rc = zeros_rc + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return zeros_rc


@triton.jit
def add_rows(a_rc, b_rc, PIECES: tl.constexpr):
    sums_rc = ()
    for piece in tl.static_range(PIECES):
        sums_rc = sums_rc + (a_rc[piece] + b_rc[piece],)
    return sums_rc


@triton.jit
def multiply_rows(a_rc, b_rc, PIECES: tl.constexpr):
    products_rc = ()
    for piece in tl.static_range(PIECES):
        products_rc = products_rc + (a_rc[piece] * b_rc[piece],)
    return products_rc


@triton.jit
def scale_rows(a_rc, factor_r, PIECES: tl.constexpr):
    products_rc = ()
    for piece in tl.static_range(PIECES):
        products_rc = products_rc + (a_rc[piece] * factor_r[:, None],)
    return products_rc


@triton.jit
def round_rows(a_rc, dtype: tl.constexpr, PIECES: tl.constexpr):
    """The values that memory of ``dtype`` will hold."""
    rounded_rc = ()
    for piece in tl.static_range(PIECES):
        rounded_rc = rounded_rc + (a_rc[piece].to(dtype).to(tl.float32),)
    return rounded_rc


@triton.jit
def centre_rows(a_rc, mean_r, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """a - mean, zero past the width."""
    centred_rc = ()
    for piece in tl.static_range(PIECES):
        centred = a_rc[piece] - mean_r[:, None]
        if (piece + 1) * COLUMNS > WIDTH:
            exists = (piece * COLUMNS + tl.arange(0, COLUMNS) < WIDTH)[None, :]
            centred = tl.where(exists, centred, 0.0)
        centred_rc = centred_rc + (centred,)
    return centred_rc


@triton.jit
def normalise_rows(a_rc, mean_r, rstd_r, PIECES: tl.constexpr):
    normalised_rc = ()
    for piece in tl.static_range(PIECES):
        normalised_rc = normalised_rc + ((a_rc[piece] - mean_r[:, None]) * rstd_r[:, None],)
    return normalised_rc


@triton.jit
def row_means(a_rc, WIDTH: tl.constexpr, PIECES: tl.constexpr):
    """Over all columns: the pieces first, within each thread, then once across threads."""
    total = a_rc[0]
    for piece in tl.static_range(1, PIECES):
        total += a_rc[piece]
    return tl.sum(total, 1) / WIDTH
