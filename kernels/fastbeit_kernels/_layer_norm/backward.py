"""Backward kernels: every gradient in one pass over the rows, then a sum in fixed order.

With n = (y - mean) * rstd, g = dnormed * weight, means over the columns and sums over the rows:

    dx      = dy + rstd * (g - mean(g) - n * mean(g * n))
    dbranch = drop[b] * gamma * dx
    dgamma  = sum drop[b] * branch * dx,  dweight = sum dnormed * n,  dbias = sum dnormed

A program owns one stretch of rows, goes through it tile by tile, and keeps its share of the three
sums in registers; how many programs there are is frozen configuration, and so is the order of every
sum. ``parameter_sums`` then adds up the programs' shares. While a tile is computed the next STAGES
- 1 are on their way to shared memory, so that the bytes in flight don't depend on the few warps
that the sums leave registers for.

What nobody asked for is neither read nor computed: DX, DBRANCH, DGAMMA, DWEIGHT, DBIAS are the
gradients wanted, DY and NORM the gradients that came (of y, of normed).
"""

# Triton's functions have no types, and its tuples grow by + alone.
# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    add_rows,
    load_rows,
    load_vector,
    multiply_rows,
    normalise_rows,
    row_means,
    scale_rows,
    store_rows,
    tile_rows,
    zero_rows,
)


@triton.jit
def program_tiles(total, ROWS: tl.constexpr):
    """First and last (excluded) of this program's tiles; no two shares differ by more than one."""
    tiles = tl.cdiv(total, ROWS)
    program = tl.program_id(0)
    share = tiles // tl.num_programs(0)
    longer = tiles % tl.num_programs(0)
    first = program * share + tl.minimum(program, longer)
    return first, first + share + (program < longer).to(tl.int32)


@triton.jit
def norm_gradient(dnormed_rc, weight_rc, n_rc, rstd_r, WIDTH: tl.constexpr, PIECES: tl.constexpr):
    """rstd * (g - mean(g) - n * mean(g * n)), g = dnormed * weight."""
    g_rc = multiply_rows(dnormed_rc, weight_rc, PIECES)
    mean_g = row_means(g_rc, WIDTH, PIECES)[:, None]
    mean_gn = row_means(multiply_rows(g_rc, n_rc, PIECES), WIDTH, PIECES)[:, None]
    found_rc = ()
    for piece in tl.static_range(PIECES):
        found = g_rc[piece] - mean_g - n_rc[piece] * mean_gn
        found_rc = found_rc + (found * rstd_r[:, None],)
    return found_rc


@triton.jit
def store_share(
    partials_ptr,
    slot: tl.constexpr,
    slots: tl.constexpr,
    sums_rc,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """This program's share of one parameter's gradient: ``partials [programs, slots, WIDTH]``."""
    base = partials_ptr + (tl.program_id(0).to(tl.int64) * slots + slot) * WIDTH
    for piece in tl.static_range(PIECES):
        columns = piece * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(base + columns, tl.sum(sums_rc[piece], 0), mask=columns < WIDTH)


@triton.jit
def residual_norm_backward(
    dy_ptr,
    dnormed_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    branch_ptr,
    gamma_ptr,
    drop_ptr,
    dx_ptr,
    dbranch_ptr,
    partials_ptr,
    dy_image,
    dy_token,
    dnormed_image,
    dnormed_token,
    y_image,
    y_token,
    branch_image,
    branch_token,
    drop_image,
    total,
    tokens,
    DY: tl.constexpr,
    NORM: tl.constexpr,
    GAMMA: tl.constexpr,
    DROP: tl.constexpr,
    DX: tl.constexpr,
    DBRANCH: tl.constexpr,
    DGAMMA: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One stretch of rows a program."""
    first, last = program_tiles(total, ROWS)
    # Whether anything is wanted that the gradient of y passes through.
    THROUGH: tl.constexpr = DX or DBRANCH or DGAMMA
    weight_rc = ()
    gamma_rc = ()
    if NORM and THROUGH:
        weight_rc = load_vector(weight_ptr, ROWS, WIDTH, COLUMNS, PIECES)
    if DBRANCH and GAMMA:
        gamma_rc = load_vector(gamma_ptr, ROWS, WIDTH, COLUMNS, PIECES)
    dgamma_rc = zero_rows(ROWS, COLUMNS, PIECES)
    dweight_rc = zero_rows(ROWS, COLUMNS, PIECES)
    dbias_rc = zero_rows(ROWS, COLUMNS, PIECES)
    for tile in tl.range(first, last, num_stages=STAGES):
        rows, inside_r, image_r, token_r = tile_rows(tile, total, tokens, ROWS)
        out_r = rows.to(tl.int64) * WIDTH
        dx_rc = zero_rows(ROWS, COLUMNS, PIECES)
        if DY and THROUGH:
            starts_r = image_r * dy_image + token_r * dy_token
            dx_rc = load_rows(dy_ptr, starts_r, inside_r, ROWS, WIDTH, COLUMNS, PIECES)
        if NORM:
            starts_r = image_r * dnormed_image + token_r * dnormed_token
            dnormed_rc = load_rows(dnormed_ptr, starts_r, inside_r, ROWS, WIDTH, COLUMNS, PIECES)
            if DBIAS:
                dbias_rc = add_rows(dbias_rc, dnormed_rc, PIECES)
            if THROUGH or DWEIGHT:
                starts_r = image_r * y_image + token_r * y_token
                n_rc = load_rows(y_ptr, starts_r, inside_r, ROWS, WIDTH, COLUMNS, PIECES)
                mean_r = tl.load(mean_ptr + rows, mask=inside_r, other=0.0)
                rstd_r = tl.load(rstd_ptr + rows, mask=inside_r, other=0.0)
                n_rc = normalise_rows(n_rc, mean_r, rstd_r, PIECES)
                if DWEIGHT:
                    product_rc = multiply_rows(dnormed_rc, n_rc, PIECES)
                    dweight_rc = add_rows(dweight_rc, product_rc, PIECES)
                if THROUGH:
                    own_rc = norm_gradient(dnormed_rc, weight_rc, n_rc, rstd_r, WIDTH, PIECES)
                    dx_rc = add_rows(dx_rc, own_rc, PIECES)
        if DX:
            store_rows(dx_ptr, out_r, inside_r, dx_rc, ROWS, WIDTH, COLUMNS, PIECES)
        if DBRANCH or DGAMMA:
            if DROP:
                drop_r = tl.load(drop_ptr + image_r * drop_image, mask=inside_r, other=0.0)
                dx_rc = scale_rows(dx_rc, drop_r.to(tl.float32), PIECES)
            if DGAMMA:
                starts_r = image_r * branch_image + token_r * branch_token
                branch_rc = load_rows(branch_ptr, starts_r, inside_r, ROWS, WIDTH, COLUMNS, PIECES)
                dgamma_rc = add_rows(dgamma_rc, multiply_rows(dx_rc, branch_rc, PIECES), PIECES)
            if DBRANCH:
                if GAMMA:
                    dx_rc = multiply_rows(dx_rc, gamma_rc, PIECES)
                store_rows(dbranch_ptr, out_r, inside_r, dx_rc, ROWS, WIDTH, COLUMNS, PIECES)
    SLOTS: tl.constexpr = DGAMMA + DWEIGHT + DBIAS
    if DGAMMA:
        store_share(partials_ptr, 0, SLOTS, dgamma_rc, WIDTH, COLUMNS, PIECES)
    if DWEIGHT:
        store_share(partials_ptr, DGAMMA, SLOTS, dweight_rc, WIDTH, COLUMNS, PIECES)
    if DBIAS:
        store_share(partials_ptr, DGAMMA + DWEIGHT, SLOTS, dbias_rc, WIDTH, COLUMNS, PIECES)


@triton.jit
def parameter_sums(
    partials_ptr,
    dgamma_ptr,
    dweight_ptr,
    dbias_ptr,
    programs,
    DGAMMA: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """COLUMNS columns of one parameter's gradient: the sum over ``partials [programs, slots, D]``.

    PROGRAMS shares at a time (all, unless there are very many), then over these.
    """
    SLOTS: tl.constexpr = DGAMMA + DWEIGHT + DBIAS
    blocks = tl.cdiv(WIDTH, COLUMNS)
    slot = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns < WIDTH
    sums = tl.zeros([PROGRAMS, COLUMNS], tl.float32)
    for start in range(0, programs, PROGRAMS):
        program = start + tl.arange(0, PROGRAMS)
        starts = (program.to(tl.int64) * SLOTS + slot) * WIDTH
        mask = (program < programs)[:, None] & exists[None, :]
        sums += tl.load(partials_ptr + starts[:, None] + columns[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    if DGAMMA:
        here = exists & (slot == 0)
        tl.store(dgamma_ptr + columns, total.to(dgamma_ptr.dtype.element_ty), mask=here)
    if DWEIGHT:
        here = exists & (slot == DGAMMA)
        tl.store(dweight_ptr + columns, total.to(dweight_ptr.dtype.element_ty), mask=here)
    if DBIAS:
        here = exists & (slot == DGAMMA + DWEIGHT)
        tl.store(dbias_ptr + columns, total.to(dbias_ptr.dtype.element_ty), mask=here)
