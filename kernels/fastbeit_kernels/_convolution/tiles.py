"""What the convolution kernels share: which pixels a program has, and its sums over taps.

A convolution in channels-last memory is a product [pixels, taps x channels] @ [taps x channels,
outputs] whose left side is never written down ("implicit GEMM"): each tap's part of it is the
input itself, shifted, with zeros beyond the edges. So a 3 x 3 convolution reads its input nine
times from L2. Where that binds, a program computes ROWS image rows that lie below each other, and
what it reads for one serves the others: 3 (ROWS + 2) / ROWS reads of a pixel instead of 9, 4.5 for
four rows, and the filters are read once for all of them.

Shapes: p pixels of a tile, in raster order over all images and groups of ROWS image rows; c input
channels of a chunk; o output channels of a tile.
"""

# ruff: noqa: RUF005 (Triton adds tuples, and unpacks none)

from __future__ import annotations

import triton
import triton.language as tl

from .._products import dot_add

NOWHERE = tl.constexpr(-(1 << 24))


@triton.jit
def relu(tile):
    """max(x, 0), NaN kept, as ``torch.relu`` has it."""
    return tl.where(tile < 0, 0.0, tile).to(tile.dtype)


@triton.jit
def pixel_block(block, images, height, width, PIXELS: tl.constexpr, ROWS: tl.constexpr):
    """(image, y, x) of a block's pixels in the first of their ROWS rows; image is int64.

    Only scalars are divided in 64 bits. A pixel past the last is placed far outside its image, so
    that no tap of it falls inside.
    """
    area = tl.cdiv(height, ROWS) * width
    first = block.to(tl.int64) * PIXELS
    first_image = first // area
    place = (first - first_image * area).to(tl.int32) + tl.arange(0, PIXELS)
    image = first_image + place // area
    place = place % area
    y = tl.where(image < images, place // width * ROWS, NOWHERE)
    return image, y, place % width


@triton.jit
def place(pointer, image, y, x, image_step, row_step, column_step):
    """Pointers to channel 0 of pixels, in a tensor of any strides but the channels'."""
    return pointer + image * image_step + y.to(tl.int64) * row_step + x.to(tl.int64) * column_step


@triton.jit
def input_tile(
    input_p, inside, shift, channels, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    RELU_INPUT: tl.constexpr,
):  # fmt: skip
    """[PIXELS, DEPTH] of the input, ``shift`` elements further; zero where not ``inside``."""
    mask_pc = inside[:, None]
    if CHANNELS % DEPTH:
        mask_pc = mask_pc & (channels < CHANNELS)[None, :]
    tile_pc = tl.load(input_p[:, None] + (shift + channels)[None, :], mask=mask_pc, other=0.0)
    if RELU_INPUT:
        tile_pc = relu(tile_pc)
    return tile_pc


@triton.jit
def filter_tile(
    filter_ptr, tap, channels, outputs, TAPS: tl.constexpr, CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[DEPTH, TILE_OUTPUTS] of filters [OUTPUTS, TAPS, CHANNELS]."""
    filter_oc = filter_ptr + outputs[:, None] * (TAPS * CHANNELS)
    filter_oc += (tap * CHANNELS + channels)[None, :]
    if OUTPUTS % TILE_OUTPUTS or CHANNELS % DEPTH:
        mask_oc = (outputs < OUTPUTS)[:, None] & (channels < CHANNELS)[None, :]
        return tl.trans(tl.load(filter_oc, mask=mask_oc, other=0.0))
    return tl.trans(tl.load(filter_oc))


@triton.jit
def sum_over_taps(
    input_p, filter_ptr, y, x, height, width, row_step, column_step, chunks, outputs,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, SIDE: tl.constexpr, RELU_INPUT: tl.constexpr,
    PIXELS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """fp32 [PIXELS, TILE_OUTPUTS]: the convolution at (y, x), for the channels ``outputs``.

    ``chunks`` of DEPTH channels are all; as an argument, because of a known number of steps the
    compiler makes copies.
    """
    TAPS: tl.constexpr = SIDE * SIDE
    sums_po = tl.zeros([PIXELS, TILE_OUTPUTS], tl.float32)
    for step in range(0, TAPS * chunks):
        tap = step % TAPS
        channels = step // TAPS * DEPTH + tl.arange(0, DEPTH)
        dy = tap // SIDE - SIDE // 2
        dx = tap % SIDE - SIDE // 2
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        shift = dy * row_step + dx * column_step
        tile_pc = input_tile(input_p, inside, shift, channels, CHANNELS, DEPTH, RELU_INPUT)
        weights_co = filter_tile(
            filter_ptr, tap, channels, outputs, TAPS, CHANNELS, OUTPUTS, TILE_OUTPUTS, DEPTH
        )
        sums_po = dot_add(tile_pc, weights_co, sums_po)
    return sums_po


@triton.jit
def sums_of_rows(
    input_p, filter_ptr, y, x, height, width, row_step, column_step, chunks, outputs,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, SIDE: tl.constexpr, RELU_INPUT: tl.constexpr,
    PIXELS: tl.constexpr, ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """:func:`sum_over_taps` at (y, x), (y + 1, x), ... (y + ROWS - 1, x): a tuple."""
    TAPS: tl.constexpr = SIDE * SIDE
    sums = (tl.zeros([PIXELS, TILE_OUTPUTS], tl.float32),)
    for _ in tl.static_range(1, ROWS):
        sums = sums + (tl.zeros([PIXELS, TILE_OUTPUTS], tl.float32),)
    for step in range(0, SIDE * chunks):
        column = step % SIDE
        dx = column - SIDE // 2
        channels = step // SIDE * DEPTH + tl.arange(0, DEPTH)
        beside = (x + dx >= 0) & (x + dx < width)
        filters = ()
        for row in tl.static_range(SIDE):
            weights_co = filter_tile(
                filter_ptr, row * SIDE + column, channels, outputs,
                TAPS, CHANNELS, OUTPUTS, TILE_OUTPUTS, DEPTH,
            )  # fmt: skip
            filters = filters + (weights_co,)
        for read in tl.static_range(ROWS + SIDE - 1):
            dy = read - SIDE // 2
            inside = beside & (y + dy >= 0) & (y + dy < height)
            shift = dy * row_step + dx * column_step
            tile_pc = input_tile(input_p, inside, shift, channels, CHANNELS, DEPTH, RELU_INPUT)
            extended = ()
            for row in tl.static_range(ROWS):
                if read >= row and read - row < SIDE:
                    extended = extended + (dot_add(tile_pc, filters[read - row], sums[row]),)
                else:
                    extended = extended + (sums[row],)
            sums = extended
    return sums


@triton.jit
def finish(
    sums_po, bias_ptr, residual_p, out_p, there, outputs, gain,
    OUTPUTS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU_OUTPUT: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Store [ReLU] (residual + gain * (sums + bias)), rounded once."""
    known = outputs < OUTPUTS
    mask_po = there[:, None]
    if OUTPUTS % TILE_OUTPUTS:
        mask_po = mask_po & known[None, :]
    if BIAS:
        sums_po += tl.load(bias_ptr + outputs, mask=known, other=0.0).to(tl.float32)[None, :]
    sums_po *= gain
    if RESIDUAL:
        residual_po = residual_p[:, None] + outputs[None, :]
        sums_po += tl.load(residual_po, mask=mask_po, other=0.0).to(tl.float32)
    if RELU_OUTPUT:
        sums_po = relu(sums_po)
    sums_po = sums_po.to(out_p.dtype.element_ty)
    tl.store(out_p[:, None] + outputs[None, :], sums_po, mask=mask_po)
