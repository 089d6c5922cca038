"""Forward kernel: y = x + drop[b] * gamma * branch, and normed = (y - mean) * rstd * weight + bias.

x and branch are read once, y and normed written once; between them a row stays in registers. y is
added in fp32 and rounded once, to x's dtype; the norm is that of the rounded y, which the backward
kernel and every later reader see. The variance is the mean of the squared distances from the mean
(never the difference of two large sums), in fp32.

Every optional piece is a compile-time flag of this one kernel: BRANCH (else y is x, which is not
written again), GAMMA, DROP, NORM (else y alone), BIAS. Rows: the tokens of all images, image by
image; x and branch may have any constant distance between tokens and between images.
"""

# Triton's functions have no types.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    add_rows,
    centre_rows,
    load_rows,
    load_vector,
    multiply_rows,
    round_rows,
    row_means,
    scale_rows,
    store_rows,
    tile_rows,
)


@triton.jit
def residual_norm_forward(
    x_ptr,
    branch_ptr,
    gamma_ptr,
    drop_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    x_image,
    x_token,
    branch_image,
    branch_token,
    drop_image,
    total,
    tokens,
    eps,
    BRANCH: tl.constexpr,
    GAMMA: tl.constexpr,
    DROP: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One tile of rows a program."""
    rows, inside_r, image_r, token_r = tile_rows(tl.program_id(0), total, tokens, ROWS)
    out_r = rows.to(tl.int64) * WIDTH
    starts_r = image_r * x_image + token_r * x_token
    y_rc = load_rows(x_ptr, starts_r, inside_r, ROWS, WIDTH, COLUMNS, PIECES)
    if BRANCH:
        starts_r = image_r * branch_image + token_r * branch_token
        scaled_rc = load_rows(branch_ptr, starts_r, inside_r, ROWS, WIDTH, COLUMNS, PIECES)
        if GAMMA:
            gamma_rc = load_vector(gamma_ptr, ROWS, WIDTH, COLUMNS, PIECES)
            scaled_rc = multiply_rows(scaled_rc, gamma_rc, PIECES)
        if DROP:
            drop_r = tl.load(drop_ptr + image_r * drop_image, mask=inside_r, other=0.0)
            scaled_rc = scale_rows(scaled_rc, drop_r.to(tl.float32), PIECES)
        y_rc = round_rows(add_rows(y_rc, scaled_rc, PIECES), y_ptr.dtype.element_ty, PIECES)
        store_rows(y_ptr, out_r, inside_r, y_rc, ROWS, WIDTH, COLUMNS, PIECES)
    if NORM:
        mean_r = row_means(y_rc, WIDTH, PIECES)
        centred_rc = centre_rows(y_rc, mean_r, WIDTH, COLUMNS, PIECES)
        variance_r = row_means(multiply_rows(centred_rc, centred_rc, PIECES), WIDTH, PIECES)
        # Rounded to nearest: an approximate root would be off the same way in a whole row.
        rstd_r = tl.div_rn(1.0, tl.sqrt_rn(variance_r + eps))
        weight_rc = load_vector(weight_ptr, ROWS, WIDTH, COLUMNS, PIECES)
        normed_rc = multiply_rows(scale_rows(centred_rc, rstd_r, PIECES), weight_rc, PIECES)
        if BIAS:
            bias_rc = load_vector(bias_ptr, ROWS, WIDTH, COLUMNS, PIECES)
            normed_rc = add_rows(normed_rc, bias_rc, PIECES)
        store_rows(normed_ptr, out_r, inside_r, normed_rc, ROWS, WIDTH, COLUMNS, PIECES)
        # Last, because each takes a barrier: a number for each row is laid out unlike the rows.
        tl.store(mean_ptr + rows, mean_r, mask=inside_r)
        tl.store(rstd_ptr + rows, rstd_r, mask=inside_r)
