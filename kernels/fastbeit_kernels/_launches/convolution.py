"""Launches of the convolutions of DALL-E's encoder, a batch of 128 views of 112 pixels.

All four groups, whether or not the tokenizer gives them to the kernels: the report is what that is
decided by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .._convolution import arguments as convolution
from .record import Record, meta

BATCH = 128


@dataclass(frozen=True)
class Group:
    """Blocks at ``side`` x ``side`` pixels; the first reads ``inputs`` channels, all give ``width``
    and have a quarter of it inside."""

    side: int
    inputs: int
    width: int

    @property
    def hidden(self) -> int:
        return self.width // 4


GROUPS = (
    Group(112, 256, 256),
    Group(56, 256, 512),
    Group(28, 512, 1024),
    Group(14, 1024, 2048),
)
FUSED_HIDDEN = 128


def _pixels(channels: int, side: int, dtype: torch.dtype) -> torch.Tensor:
    return meta(BATCH, side, side, channels, dtype=dtype).permute(0, 3, 1, 2)


def _filters(outputs: int, inputs: int, kernel: int, dtype: torch.dtype) -> torch.Tensor:
    return meta(outputs, kernel, kernel, inputs, dtype=dtype).permute(0, 3, 1, 2)


def _reads(kernel: int, rows: int) -> float:
    """How often a program reads a pixel of its input, edges aside."""
    return kernel * (rows + kernel - 1) / rows


def conv_record(
    family: str,
    dtype: torch.dtype,
    side: int,
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    relu_input: bool = False,
    relu_output: bool = False,
    residual: bool = False,
) -> Record:
    x, out = _pixels(inputs, side, dtype), _pixels(outputs, side, dtype)
    weight, bias = _filters(outputs, inputs, kernel, dtype), meta(outputs, dtype=dtype)
    skip = _pixels(outputs, side, dtype) if residual else None
    config = convolution.config_of(x, family)
    tile = convolution.conv_tile(config, weight)
    launch = convolution.conv_launch(
        x, weight, bias, skip, out,
        gain=1 / 64 if residual else 1.0, relu_input=relu_input, relu_output=relu_output,
        config=config,
    )  # fmt: skip
    extras = [", ReLU in"] * relu_input + [", ReLU"] * relu_output + [", residual"] * residual
    name = f"conv {kernel}x{kernel}{''.join(extras)}: dVAE {side}x{side}, {inputs} to {outputs}"
    size, taps = dtype.itemsize, kernel * kernel
    pixels = BATCH * side * side
    blocks = convolution.pixel_tiles(x, tile)
    columns = -(-outputs // tile.outputs) * tile.outputs
    depth = taps * -(-inputs // tile.depth) * tile.depth
    stored = pixels * outputs * (2 if residual else 1)
    once = pixels * inputs + stored + weight.numel() + outputs
    tiles = columns // tile.outputs
    read = tiles * pixels * _reads(kernel, tile.rows) * inputs + blocks * (weight.numel() + outputs)
    return Record(
        name,
        str(dtype).removeprefix("torch."),
        launch,
        2 * pixels * outputs * taps * inputs,
        2 * blocks * tile.pixels * tile.rows * columns * depth,
        once * size,
        round((read + stored) * size),
    )


def fused_record(family: str, dtype: torch.dtype, side: int, hidden: int, outputs: int) -> Record:
    """3 x 3, ReLU, 1 x 1, residual."""
    x, out, skip = (_pixels(n, side, dtype) for n in (hidden, outputs, outputs))
    weight, bias = _filters(hidden, hidden, 3, dtype), meta(hidden, dtype=dtype)
    pointwise, pointwise_bias = _filters(outputs, hidden, 1, dtype), meta(outputs, dtype=dtype)
    config = convolution.config_of(x, family)
    tile = convolution.fused_tile(config, weight, outputs)
    launch = convolution.conv_pointwise_launch(
        x, weight, bias, pointwise, pointwise_bias, skip, out,
        gain=1 / 64, relu_output=False, config=config,
    )  # fmt: skip
    size, pixels = dtype.itemsize, BATCH * side * side
    blocks = convolution.pixel_tiles(x, tile)
    weights = weight.numel() + hidden + pointwise.numel() + outputs
    stored = 2 * pixels * outputs
    products = hidden * (9 * hidden + outputs)
    return Record(
        f"conv 3x3, ReLU, 1x1, residual: dVAE {side}x{side}, {hidden} to {outputs}",
        str(dtype).removeprefix("torch."),
        launch,
        2 * pixels * products,
        2 * blocks * tile.pixels * tile.rows * products,
        (pixels * hidden + stored + weights) * size,
        round((_reads(3, tile.rows) * pixels * hidden + stored + blocks * weights) * size),
    )


def group_records(family: str, group: Group, dtype: torch.dtype) -> Iterator[Record]:
    """What differs among a group's convolutions."""
    side, hidden, width = group.side, group.hidden, group.width
    for inputs in sorted({group.inputs, width}):
        yield conv_record(family, dtype, side, inputs, hidden, 3, relu_input=True, relu_output=True)
    yield conv_record(family, dtype, side, hidden, hidden, 3, relu_output=True)
    if group.inputs != width:
        yield conv_record(family, dtype, side, group.inputs, width, 1)
    if hidden <= FUSED_HIDDEN:
        yield fused_record(family, dtype, side, hidden, width)
    else:
        yield conv_record(family, dtype, side, hidden, width, 1, residual=True)


def records(family: str) -> Iterator[Record]:
    """Every convolution of the encoder's blocks on a GPU of a family."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for group in GROUPS:
            yield from group_records(family, group, dtype)
