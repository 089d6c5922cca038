"""What the convolution kernels share: which pixels a program has, and the sum over taps.

A convolution in channels-last memory is a product [pixels, taps x channels] @ [taps x channels,
outputs] whose left side is never written down ("implicit GEMM"): each tap's part of it is the
input itself, shifted, with zeros beyond the edges.

Shapes: p pixels of a tile, in raster order over all images; c input channels of a chunk; o output
channels of a tile.
"""

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
def pixel_block(block, images, height, width, PIXELS: tl.constexpr):
    """(first, image, y, x, there) of the PIXELS pixels of a block; the first two are int64.

    Only scalars are divided in 64 bits. A pixel past the last is placed far outside its image, so
    that no tap of it falls inside.
    """
    area = height * width
    first = block.to(tl.int64) * PIXELS
    first_image = first // area
    place = (first - first_image * area).to(tl.int32) + tl.arange(0, PIXELS)
    image = first_image + place // area
    place = place % area
    there = image < images
    y = tl.where(there, place // width, NOWHERE)
    return first, image, y, place % width, there


@triton.jit
def offsets(image, y, x, image_step, row_step, column_step):
    """Of pixels in a tensor whose strides needn't be those of dense memory; int64."""
    return image * image_step + y.to(tl.int64) * row_step + x.to(tl.int64) * column_step


@triton.jit
def sum_over_taps(
    input_p,
    filter_ptr,
    y,
    x,
    height,
    width,
    row_step,
    column_step,
    outputs,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SIDE: tl.constexpr,
    RELU_INPUT: tl.constexpr,
    PIXELS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """fp32 [PIXELS, TILE_OUTPUTS]: the convolution at the pixels (y, x), for channels ``outputs``.

    ``input_p`` points to channel 0 of each pixel; the filters are [OUTPUTS, SIDE, SIDE, CHANNELS].
    """
    TAPS: tl.constexpr = SIDE * SIDE
    CHUNKS: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    sums_po = tl.zeros([PIXELS, TILE_OUTPUTS], tl.float32)
    for step in range(0, TAPS * CHUNKS):
        tap = step % TAPS
        channels = step // TAPS * DEPTH + tl.arange(0, DEPTH)
        dy = tap // SIDE - SIDE // 2
        dx = tap % SIDE - SIDE // 2
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        shift = dy * row_step + dx * column_step
        input_pc = input_p[:, None] + (shift + channels)[None, :]
        filter_oc = filter_ptr + outputs[:, None] * (TAPS * CHANNELS)
        filter_oc += (tap * CHANNELS + channels)[None, :]
        mask_pc = inside[:, None]
        if CHANNELS % DEPTH:
            mask_pc = mask_pc & (channels < CHANNELS)[None, :]
        tile_pc = tl.load(input_pc, mask=mask_pc, other=0.0)
        if RELU_INPUT:
            tile_pc = relu(tile_pc)
        if OUTPUTS % TILE_OUTPUTS or CHANNELS % DEPTH:
            mask_oc = (outputs < OUTPUTS)[:, None] & (channels < CHANNELS)[None, :]
            weights_oc = tl.load(filter_oc, mask=mask_oc, other=0.0)
        else:
            weights_oc = tl.load(filter_oc)
        sums_po = dot_add(tile_pc, tl.trans(weights_oc), sums_po)
    return sums_po


@triton.jit
def finish(
    sums_po,
    bias_ptr,
    residual_p,
    out_ptr,
    first,
    there,
    outputs,
    gain,
    OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU_OUTPUT: tl.constexpr,
    PIXELS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
):
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
    places = tl.arange(0, PIXELS)[:, None] * OUTPUTS + outputs[None, :]
    tl.store(out_ptr + first * OUTPUTS + places, sums_po.to(out_ptr.dtype.element_ty), mask=mask_po)
