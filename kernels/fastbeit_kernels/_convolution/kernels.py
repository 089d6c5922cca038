"""Convolutions of stride 1 that keep the size, in channels-last memory.

``conv``:            out = [ReLU] (residual + gain * (bias + filters * [ReLU] input))
``conv_pointwise``:  hidden = ReLU(bias + filters * input)
                     out = [ReLU] (residual + gain * (bias' + hidden @ pointwise))

The second is the end of a residual block, a 3 x 3 convolution and the 1 x 1 one that reads it: a
program computes all hidden channels of its pixels, rounds them to the input's dtype, and multiplies
them where they are. Written out and read again, they would add 3.2 MB to 14.5 (64 hidden channels,
256 outputs, one image of 112 x 112 pixels in 16 bits). The whole block in one kernel would compute
a two-pixel rim of each tile again: 39 % more arithmetic.

Shapes: input [images, height, width, CHANNELS] and residual [images, height, width, OUTPUTS], with
strides; filters [OUTPUTS or HIDDEN, SIDE, SIDE, CHANNELS], pointwise [OUTPUTS, HIDDEN] and out
[images, height, width, OUTPUTS] dense. A program has PIXELS places of ROWS image rows (``tiles``).
"""

# ruff: noqa: RUF005 (Triton adds tuples, and unpacks none)

from __future__ import annotations

import triton
import triton.language as tl

from .._products import dot
from .tiles import finish, pixel_block, place, relu, sum_over_taps, sums_of_rows


@triton.jit
def conv(
    input_ptr,
    filter_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    input_image,
    input_row,
    input_column,
    residual_image,
    residual_row,
    residual_column,
    out_image,
    out_row,
    out_column,
    images,
    height,
    width,
    chunks,
    gain,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SIDE: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU_INPUT: tl.constexpr,
    RELU_OUTPUT: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of pixels and outputs. Tiles of the same pixels are neighbours: L2 has the input."""
    output_tiles: tl.constexpr = (OUTPUTS + TILE_OUTPUTS - 1) // TILE_OUTPUTS
    program = tl.program_id(0)
    image, y, x = pixel_block(  # pyright: ignore[reportGeneralTypeIssues]
        program // output_tiles, images, height, width, PIXELS, ROWS
    )
    outputs = program % output_tiles * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    input_p = place(input_ptr, image, y, x, input_image, input_row, input_column)
    if ROWS == 1:
        one = sum_over_taps(
            input_p, filter_ptr, y, x, height, width, input_row, input_column, chunks, outputs,
            CHANNELS, OUTPUTS, SIDE, RELU_INPUT, PIXELS, TILE_OUTPUTS, DEPTH,
        )  # fmt: skip
        sums = (one,)
    else:
        sums = sums_of_rows(
            input_p, filter_ptr, y, x, height, width, input_row, input_column, chunks, outputs,
            CHANNELS, OUTPUTS, SIDE, RELU_INPUT, PIXELS, ROWS, TILE_OUTPUTS, DEPTH,
        )  # fmt: skip
    residual_p = place(residual_ptr, image, y, x, residual_image, residual_row, residual_column)
    out_p = place(out_ptr, image, y, x, out_image, out_row, out_column)
    for row in tl.static_range(ROWS):
        finish(
            sums[row], bias_ptr, residual_p + row * residual_row, out_p + row * out_row,
            (y >= 0) & (y + row < height), outputs, gain,
            OUTPUTS, BIAS, RESIDUAL, RELU_OUTPUT, TILE_OUTPUTS,
        )  # fmt: skip


@triton.jit
def conv_pointwise(
    input_ptr,
    filter_ptr,
    bias_ptr,
    pointwise_ptr,
    pointwise_bias_ptr,
    residual_ptr,
    out_ptr,
    input_image,
    input_row,
    input_column,
    residual_image,
    residual_row,
    residual_column,
    out_image,
    out_row,
    out_column,
    images,
    height,
    width,
    chunks,
    gain,
    outputs_all,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SIDE: tl.constexpr,
    BIAS: tl.constexpr,
    POINTWISE_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU_OUTPUT: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_HIDDEN: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One block of pixels, all outputs, TILE_OUTPUTS at a time. h are the hidden channels."""
    image, y, x = pixel_block(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(0), images, height, width, PIXELS, ROWS
    )
    h = tl.arange(0, PADDED_HIDDEN)
    input_p = place(input_ptr, image, y, x, input_image, input_row, input_column)
    if ROWS == 1:
        one = sum_over_taps(
            input_p, filter_ptr, y, x, height, width, input_row, input_column, chunks, h,
            CHANNELS, HIDDEN, SIDE, False, PIXELS, PADDED_HIDDEN, DEPTH,
        )  # fmt: skip
        sums = (one,)
    else:
        sums = sums_of_rows(
            input_p, filter_ptr, y, x, height, width, input_row, input_column, chunks, h,
            CHANNELS, HIDDEN, SIDE, False, PIXELS, ROWS, PADDED_HIDDEN, DEPTH,
        )  # fmt: skip
    hidden = ()
    for row in tl.static_range(ROWS):
        hidden_ph = sums[row]
        if BIAS:
            hidden_ph += tl.load(bias_ptr + h, mask=h < HIDDEN, other=0.0).to(tl.float32)[None, :]
        hidden_ph = relu(hidden_ph).to(input_ptr.dtype.element_ty)
        if HIDDEN != PADDED_HIDDEN:  # zero weights don't keep out what is infinite
            hidden_ph = tl.where((h < HIDDEN)[None, :], hidden_ph, 0.0).to(hidden_ph.dtype)
        hidden = hidden + (hidden_ph,)
    residual_p = place(residual_ptr, image, y, x, residual_image, residual_row, residual_column)
    out_p = place(out_ptr, image, y, x, out_image, out_row, out_column)
    for start in range(0, outputs_all, TILE_OUTPUTS):
        outputs = start + tl.arange(0, TILE_OUTPUTS)
        pointwise_oh = pointwise_ptr + outputs[:, None] * HIDDEN + h[None, :]
        if OUTPUTS % TILE_OUTPUTS or HIDDEN != PADDED_HIDDEN:
            mask_oh = (outputs < OUTPUTS)[:, None] & (h < HIDDEN)[None, :]
            weights_oh = tl.load(pointwise_oh, mask=mask_oh, other=0.0)
        else:
            weights_oh = tl.load(pointwise_oh)
        for row in tl.static_range(ROWS):
            finish(
                dot(hidden[row], tl.trans(weights_oh)), pointwise_bias_ptr,
                residual_p + row * residual_row, out_p + row * out_row,
                (y >= 0) & (y + row < height), outputs, gain,
                OUTPUTS, POINTWISE_BIAS, RESIDUAL, RELU_OUTPUT, TILE_OUTPUTS,
            )  # fmt: skip
