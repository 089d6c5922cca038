"""From tensors to launches of the convolution kernels; the compile report makes the same ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._configs import family_of
from .._launch import Launch
from . import kernels
from .configs import CONVOLUTION, ConvConfig, ConvTile


def padded_to_power_of_two(channels: int) -> int:
    """16 at least, the shortest side of a tensor-core product."""
    return max(16, 1 << (channels - 1).bit_length())


def config_of(x: Tensor, family: str | None = None) -> ConvConfig:
    """Launch choices for x's device (or GPU family) and dtype.

    The interpreter has no registers to run out of: it takes a Hopper's 16-bit tiles for any dtype.
    """
    bits = x.element_size() * 8
    if family is None and x.device.type == "cpu":
        family, bits = "sm_90", 16
    elif family is None:
        family = family_of(torch.cuda.get_device_capability(x.device))
    return CONVOLUTION[family, bits]


def conv_tile(config: ConvConfig, weight: Tensor) -> ConvTile:
    outputs, channels, side, _ = weight.shape
    if side == 1:
        return _fitted(config.pointwise, channels, outputs, side)
    return _fitted(config.narrow if outputs <= 64 else config.wide, channels, outputs, side)


def fused_tile(config: ConvConfig, weight: Tensor, outputs: int) -> ConvTile:
    hidden, channels, side, _ = weight.shape
    tile = config.fused if hidden <= 64 else config.fused_wide
    return _fitted(tile, channels, outputs, side)


def _fitted(tile: ConvTile, channels: int, outputs: int, side: int) -> ConvTile:
    """No wider than the tensors, padded; rows together only where they are chosen for, at 3 x 3."""
    return replace(
        tile,
        rows=tile.rows if side == 3 else 1,
        outputs=min(tile.outputs, padded_to_power_of_two(outputs)),
        depth=min(tile.depth, padded_to_power_of_two(channels)),
    )


def _strides(name: str, tensor_BCHW: Tensor | None) -> dict[str, int]:
    image, _, row, column = (0, 0, 0, 0) if tensor_BCHW is None else tensor_BCHW.stride()
    return {f"{name}_image": image, f"{name}_row": row, f"{name}_column": column}


def pixel_tiles(x: Tensor, tile: ConvTile) -> int:
    places = x.shape[0] * -(-x.shape[2] // tile.rows) * x.shape[3]
    return -(-places // tile.pixels)


def _shared(
    x: Tensor, residual: Tensor | None, out: Tensor, gain: float, tile: ConvTile
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of both kernels. Absent tensors need a pointer all the same."""
    images, channels, height, width = x.shape
    arguments = {
        "input_ptr": x,
        "residual_ptr": x if residual is None else residual,
        "out_ptr": out,
        **_strides("input", x),
        **_strides("residual", residual),
        **_strides("out", out),
        "images": images,
        "height": height,
        "width": width,
        "chunks": -(-channels // tile.depth),
        "gain": gain,
    }
    constants = {
        "CHANNELS": channels,
        "OUTPUTS": out.shape[1],
        "RESIDUAL": residual is not None,
        "PIXELS": tile.pixels,
        "ROWS": tile.rows,
        "TILE_OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
    }
    return arguments, constants


def conv_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    gain: float,
    relu_input: bool,
    relu_output: bool,
    config: ConvConfig,
) -> Launch:
    """x, weight, residual channels-last ([B, C, H, W], [O, C, k, k], [B, O, H, W]), out dense."""
    tile = conv_tile(config, weight)
    arguments, constants = _shared(x, residual, out, gain, tile)
    arguments |= {"filter_ptr": weight, "bias_ptr": weight if bias is None else bias}
    constants |= {
        "SIDE": weight.shape[-1],
        "BIAS": bias is not None,
        "RELU_INPUT": relu_input,
        "RELU_OUTPUT": relu_output,
    }
    grid = pixel_tiles(x, tile) * -(-weight.shape[0] // tile.outputs)
    return Launch(kernels.conv, arguments, constants, grid, tile.warps, tile.stages, tile.maxnreg)


def conv_pointwise_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    gain: float,
    relu_output: bool,
    config: ConvConfig,
) -> Launch:
    """As above; pointwise_weight [O, hidden, 1, 1]."""
    hidden = weight.shape[0]
    tile = fused_tile(config, weight, pointwise_weight.shape[0])
    arguments, constants = _shared(x, residual, out, gain, tile)
    arguments |= {
        "filter_ptr": weight,
        "bias_ptr": weight if bias is None else bias,
        "pointwise_ptr": pointwise_weight,
        "pointwise_bias_ptr": weight if pointwise_bias is None else pointwise_bias,
        "outputs_all": pointwise_weight.shape[0],
    }
    constants |= {
        "HIDDEN": hidden,
        "SIDE": weight.shape[-1],
        "BIAS": bias is not None,
        "POINTWISE_BIAS": pointwise_bias is not None,
        "RELU_OUTPUT": relu_output,
        "PADDED_HIDDEN": padded_to_power_of_two(hidden),
    }
    grid = pixel_tiles(x, tile)
    return Launch(
        kernels.conv_pointwise, arguments, constants, grid, tile.warps, tile.stages, tile.maxnreg
    )
