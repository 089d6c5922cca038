"""Backward kernels: the parameters' gradients, without atomics. Images get none.

    dW[d, k]  = Σ over visible tokens (b, n) of  dout[b, 1 + n, d] pixel[b, n, k]
    dbias[d]  = Σ over visible tokens of  dout[b, 1 + n, d]
    dmask[d]  = Σ over masked tokens of  dout[b, 1 + n, d]
    dcls[d]   = Σ over b of  dout[b, 0, d]
    dpos[t, d] = Σ over b of  dout[b, t, d]

dW is a product as long as the list of visible tokens (``order.py``): shares of it, their number a
function of shapes and configuration, are summed by programs of their own, and the shares in order.
The others are sums over images, token by token, and then over tokens.

Shapes: r rows of the list, d columns of the width, k pixels of a patch, i images.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._products import dot_add
from .geometry import patch_offsets, pixel_offsets
from .order import count_visible, listed_tokens


@triton.jit
def cast(x, ELEMENT: tl.constexpr):
    if ELEMENT == "bf16":
        return x.to(tl.bfloat16)
    elif ELEMENT == "fp16":
        return x.to(tl.float16)
    else:
        return x.to(tl.float32)


@triton.jit
def weight_gradient(
    dout_ptr,
    images_ptr,
    order_ptr,
    visible_ptr,
    shares_ptr,
    dout_image,
    dout_token,
    image_step,
    plane_step,
    line_step,
    column_step,
    pixel_step,
    batch,
    patches,
    across,
    width,
    shares,
    LINES: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    PIXELS: tl.constexpr,
    MASKED: tl.constexpr,
    ELEMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """ROWS columns of the width by COLUMNS pixels, DEPTH tokens at a time → ``[shares, D, K]``.

    dout and pixels meet in ELEMENT, the projection's own.
    """
    across_tiles = tl.cdiv(PIXELS, COLUMNS)
    tiles = tl.cdiv(width, ROWS) * across_tiles
    share = tl.program_id(0) // tiles
    d = tl.program_id(0) % tiles // across_tiles * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % across_tiles * COLUMNS + tl.arange(0, COLUMNS)
    wide = (d < width)[:, None]
    offsets = pixel_offsets(k, plane_step, line_step, pixel_step, LINES, RUN)
    sums_dk = tl.zeros([ROWS, COLUMNS], tl.float32)
    visible = count_visible(visible_ptr, batch, patches, MASKED)
    blocks = tl.cdiv(visible, DEPTH)
    of_each = tl.cdiv(blocks, shares)
    for block in range(share * of_each, tl.minimum(blocks, (share + 1) * of_each)):
        rows = block * DEPTH + tl.arange(0, DEPTH)
        seen = rows < visible
        named = listed_tokens(rows, order_ptr, batch, patches, MASKED)
        corner = patch_offsets(
            named, patches, across, image_step, line_step, column_step, LINES, PATCH_WIDTH
        )
        image, token = named // (patches + 1), named % (patches + 1)
        dout_rows = image.to(tl.int64) * dout_image + token.to(tl.int64) * dout_token
        # Read as it is multiplied, already turned: a product's left side that is turned behind a
        # cast would be read from memory in pieces of 4 bytes.
        douts = dout_ptr + dout_rows[None, :] + d[:, None]
        dout_dr = tl.load(douts, mask=wide & seen[None, :], other=0.0)
        pixels = images_ptr + corner[:, None] + offsets[None, :]
        if PIXELS % COLUMNS == 0:
            pixels_rk = tl.load(pixels, mask=seen[:, None], other=0.0)
        else:
            pixels_rk = tl.load(pixels, mask=seen[:, None] & (k < PIXELS)[None, :], other=0.0)
        sums_dk = dot_add(cast(dout_dr, ELEMENT), cast(pixels_rk, ELEMENT), sums_dk)
    place = (share.to(tl.int64) * width + d)[:, None] * PIXELS + k[None, :]
    tl.store(shares_ptr + place, sums_dk, mask=(d < width)[:, None] & (k < PIXELS)[None, :])


@triton.jit
def weight_sum(
    shares_ptr,
    dweight_ptr,
    elements,
    shares,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``[shares, D, K]`` → ``[D, C, p, q]``; CHANNELS > 1: pixels come as (y, x, c)."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    total = tl.zeros([BLOCK], tl.float32)
    for share in range(shares):
        place = tl.cast(share, tl.int64) * elements + element
        total += tl.load(shares_ptr + place, mask=inside, other=0.0)
    if CHANNELS > 1:
        pixel = element % PIXELS
        colour = pixel % CHANNELS * (PIXELS // CHANNELS)
        element = element // PIXELS * PIXELS + colour + pixel // CHANNELS
    tl.store(dweight_ptr + element, total, mask=inside)


@triton.jit
def token_sums(
    dout_ptr,
    flags_ptr,
    dpos_ptr,
    dcls_ptr,
    seen_ptr,
    masked_ptr,
    dout_image,
    dout_token,
    batch,
    patches,
    width,
    MASKED: tl.constexpr,
    DPOS: tl.constexpr,
    DCLS: tl.constexpr,
    DBIAS: tl.constexpr,
    DMASK: tl.constexpr,
    IMAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token's sums over images: dpos, dcls, and its visible and its masked part ``[N, D]``."""
    tiles = tl.cdiv(width, COLUMNS)
    token = tl.program_id(0) // tiles
    d = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    there = d < width
    seen_id = tl.zeros([IMAGES, COLUMNS], tl.float32)
    masked_id = tl.zeros([IMAGES, COLUMNS], tl.float32)
    for start in range(0, batch, IMAGES):
        image = start + tl.arange(0, IMAGES)
        mask = (image < batch)[:, None] & there[None, :]
        base = dout_ptr + image.to(tl.int64) * dout_image + token.to(tl.int64) * dout_token
        dout_id = tl.load(base[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if MASKED:
            place = image.to(tl.int64) * patches + token - 1
            hides = tl.load(flags_ptr + place, mask=(image < batch) & (token > 0), other=0)
            hidden = (hides > 0)[:, None]
            masked_id += tl.where(hidden, dout_id, 0.0)
            dout_id = tl.where(hidden, 0.0, dout_id)
        seen_id += dout_id
    seen_d = tl.sum(seen_id, 0)
    masked_d = tl.sum(masked_id, 0)
    if DPOS:
        tl.store(dpos_ptr + token.to(tl.int64) * width + d, seen_d + masked_d, mask=there)
    if DCLS:
        tl.store(dcls_ptr + d, seen_d, mask=there & (token == 0))
    patch = (token.to(tl.int64) - 1) * width + d
    if DBIAS:
        tl.store(seen_ptr + patch, seen_d, mask=there & (token > 0))
    if DMASK:
        tl.store(masked_ptr + patch, masked_d, mask=there & (token > 0))


@triton.jit
def sum_over_tokens(
    parts_ptr, total_ptr, patches, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """``[N, D]`` → ``[D]``."""
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums_nd = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, patches, ROWS):
        n = start + tl.arange(0, ROWS)
        mask = (n < patches)[:, None] & (d < width)[None, :]
        parts = parts_ptr + n.to(tl.int64)[:, None] * width + d[None, :]
        sums_nd += tl.load(parts, mask=mask, other=0.0)
    tl.store(total_ptr + d, tl.sum(sums_nd, 0), mask=d < width)
