"""The registered operators of the convolutions: forward only, they have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import on_device
from .._operators import NAMESPACE
from . import arguments

LARGEST_STEP = 2**25


def channels_last(tensor_BCHW: Tensor) -> Tensor:
    """The tensor itself where the channels of a pixel lie in one piece, and rows not so far apart
    that a few of them leave 32 bits; otherwise a copy."""
    _, channel, row, column = tensor_BCHW.stride()
    if (channel == 1 or tensor_BCHW.shape[1] == 1) and max(row, column) <= LARGEST_STEP:
        return tensor_BCHW
    return tensor_BCHW.contiguous(memory_format=torch.channels_last)


def filters(weight: Tensor) -> Tensor:
    """[O, C, k, k] as [O, k, k, C] in memory: channels-last. No copy where it is so already."""
    return weight.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, outputs: int) -> Tensor:
    images, _, height, width = x.shape
    return torch.empty(
        (images, outputs, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::conv2d_channels_last", mutates_args=())
def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gain: float,
    relu_input: bool,
    relu_output: bool,
) -> Tensor:
    out = _empty(x, weight.shape[0])
    launch = arguments.conv_launch(
        channels_last(x),
        filters(weight),
        _dense(bias),
        None if residual is None else channels_last(residual),
        out,
        gain=gain,
        relu_input=relu_input,
        relu_output=relu_output,
        config=arguments.config_of(x),
    )
    with on_device(x):
        launch.run()
    return out


@conv_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gain: float,
    relu_input: bool,
    relu_output: bool,
) -> Tensor:
    return _empty(x, weight.shape[0])


@torch.library.custom_op(f"{NAMESPACE}::conv2d_pointwise_channels_last", mutates_args=())
def conv_pointwise_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    gain: float,
    relu_output: bool,
) -> Tensor:
    out = _empty(x, pointwise_weight.shape[0])
    launch = arguments.conv_pointwise_launch(
        channels_last(x),
        filters(weight),
        _dense(bias),
        filters(pointwise_weight),
        _dense(pointwise_bias),
        None if residual is None else channels_last(residual),
        out,
        gain=gain,
        relu_output=relu_output,
        config=arguments.config_of(x),
    )
    with on_device(x):
        launch.run()
    return out


@conv_pointwise_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    gain: float,
    relu_output: bool,
) -> Tensor:
    return _empty(x, pointwise_weight.shape[0])
