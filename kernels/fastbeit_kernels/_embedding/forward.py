"""Forward kernel: tokens from pixels, the mask token, CLS and absolute positions, in one pass.

    out[b, 0]     = cls                                            + pos[0]
    out[b, 1 + n] = Σ_k pixel[b, n, k] w[d, k] + bias, or mask      + pos[1 + n]

A program serves a tile of the list of tokens (``order.py``) and a tile of the width. Tiles behind
the last visible patch multiply nothing and write mask tokens and CLS; in the one tile where both
meet, the products of masked patches are thrown away. Sums are fp32 and rounded once, to the
result's dtype.

Shapes: r rows of the list, k pixels of a patch, d columns of the width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._products import dot_add
from .geometry import READ_STEP, patch_offsets, pixel_offsets
from .order import count_visible, listed_tokens

STEP = tl.constexpr(READ_STEP)
PIECE = tl.constexpr(16)


@triton.jit
def write_others(
    first,
    d,
    visible,
    cls_ptr,
    mask_ptr,
    pos_ptr,
    order_ptr,
    out_ptr,
    batch,
    patches,
    width,
    MASKED: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Mask tokens and CLS among PIECE rows of the list."""
    rows = first + tl.arange(0, PIECE)
    named = listed_tokens(rows, order_ptr, batch, patches, MASKED)
    token = named % (patches + 1)
    there = (d < width)[None, :]
    tokens_rd = tl.load(cls_ptr + d[None, :], mask=there, other=0.0).to(tl.float32)
    if MASKED:
        mask_rd = tl.load(mask_ptr + d[None, :], mask=there, other=0.0).to(tl.float32)
        tokens_rd = tl.where((token == 0)[:, None], tokens_rd, mask_rd)
    inside = ((rows >= visible) & (rows < batch * (patches + 1)))[:, None] & there
    if POSITIONS:
        pos = pos_ptr + token.to(tl.int64)[:, None] * width + d[None, :]
        tokens_rd += tl.load(pos, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + named.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(out, tokens_rd.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def embed_tokens(
    images_ptr,
    read_ptr,
    bias_ptr,
    cls_ptr,
    mask_ptr,
    pos_ptr,
    order_ptr,
    visible_ptr,
    out_ptr,
    image_step,
    plane_step,
    line_step,
    column_step,
    pixel_step,
    batch,
    patches,
    across,
    width,
    LINES: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    PIXELS: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Tiles of the width are neighbours, so that pixels come from L2 after the first."""
    tiles = tl.cdiv(width, COLUMNS)
    first = tl.program_id(0) // tiles * ROWS
    d = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    rows = first + tl.arange(0, ROWS)
    there = (d < width)[None, :]
    visible = count_visible(visible_ptr, batch, patches, MASKED)
    if first < visible:
        named = listed_tokens(rows, order_ptr, batch, patches, MASKED)
        corner = patch_offsets(
            named, patches, across, image_step, line_step, column_step, LINES, PATCH_WIDTH
        )
        # Past the last column the last one is read again; nothing of it is stored.
        read_rows = tl.minimum(d, width - 1) * (tl.cdiv(PIXELS, STEP) * STEP)
        tokens_rd = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, PIXELS, DEPTH):
            k = start + tl.arange(0, DEPTH)
            offsets = pixel_offsets(k, plane_step, line_step, pixel_step, LINES, RUN)
            pixels = images_ptr + corner[:, None] + offsets[None, :]
            if PIXELS % DEPTH == 0:
                pixels_rk = tl.load(pixels)
            else:
                pixels_rk = tl.load(pixels, mask=(k < PIXELS)[None, :], other=0.0)
            read_kd = tl.load(read_ptr + read_rows[None, :] + k[:, None])
            tokens_rd = dot_add(pixels_rk.to(read_kd.dtype), read_kd, tokens_rd)
        if BIAS:
            tokens_rd += tl.load(bias_ptr + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
        # Named again: 16 addresses kept through the products would cost a thread 32 registers.
        named = listed_tokens(rows, order_ptr, batch, patches, MASKED)
        inside = (rows < visible)[:, None] & there
        if POSITIONS:
            pos = pos_ptr + (named % (patches + 1)).to(tl.int64)[:, None] * width + d[None, :]
            tokens_rd += tl.load(pos, mask=inside, other=0.0).to(tl.float32)
        out = out_ptr + named.to(tl.int64)[:, None] * width + d[None, :]
        tl.store(out, tokens_rd.to(out_ptr.dtype.element_ty), mask=inside)
    if first + ROWS > visible:
        # A few rows at a time: the products need all registers, and this branch shares them.
        for piece in range(first, first + ROWS, PIECE):
            write_others(
                piece, d, visible, cls_ptr, mask_ptr, pos_ptr, order_ptr, out_ptr, batch, patches,
                width, MASKED, POSITIONS,
            )  # fmt: skip
