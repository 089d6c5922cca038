"""Convolutions of a frozen network, in channels-last memory, with all that is added to them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._checks import check_same_dtype, check_tensor, rows_unfit
from .._dispatch import Impl, choose

KERNEL_HIDDEN = 128
LARGEST_INT32 = 2**31 - 1
LARGEST_ROW = 2**25  # numbers: the kernels step over up to 32 rows in 32 bits
LARGEST_SIDE = 49


def conv2d_channels_last(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gain: float = 1.0,
    relu_input: bool = False,
    relu_output: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """[ReLU] (residual + gain * (conv([ReLU] x) + bias)): stride 1, the size kept. No gradient.

    Args:
        x: ``[B, C, H, W]`` fp32, fp16, bf16 or fp64, best in channels-last memory; views whose
            channels lie in one piece are read where they are.
        weight: ``[O, C, k, k]``, k odd, dtype of x. Keep it in channels-last memory: that is the
            layout the kernels read, and another is copied at each call.
        bias: ``[O]`` or None, dtype of x.
        residual: ``[B, O, H, W]`` or None, dtype of x.
        gain: a number. The kernels multiply by it in fp32, where it costs nothing.

    Returns:
        ``[B, O, H, W]`` in channels-last memory, x's dtype; the kernels round once, at the end, and
        the reference in 16 bits after the convolution too. Autocast changes nothing here.

    For frozen weights: with gradients enabled, an argument that requires one is refused.
    """
    _check(x, weight, bias, residual, weight.shape[0])
    _refuse_gradients("conv2d_channels_last", x, weight, bias, residual)
    unfit = _unfit(x, weight, weight.shape[0])
    match choose("conv2d_channels_last", impl, x, unfit):
        case "triton":
            from .._convolution import ops

            return ops.conv_forward(x, weight, bias, residual, gain, relu_input, relu_output)
        case "reference":
            return reference.conv2d_channels_last(
                x,
                weight,
                bias,
                residual=residual,
                gain=gain,
                relu_input=relu_input,
                relu_output=relu_output,
            )


def conv2d_pointwise_channels_last(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    gain: float = 1.0,
    relu_output: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """[ReLU] (residual + gain * (conv1x1(ReLU(conv(x) + bias)) + pointwise_bias)). No gradient.

    The end of a residual block; between the two convolutions nothing leaves the chip.

    Args:
        x: ``[B, C, H, W]``, as in :func:`conv2d_channels_last`, as are the other arguments.
        weight, bias: ``[N, C, k, k]`` and ``[N]`` or None: N hidden channels, which the kernels
            round to x's dtype, as the reference does; they take up to 128.
        pointwise_weight, pointwise_bias: ``[O, N, 1, 1]`` and ``[O]`` or None.
        residual: ``[B, O, H, W]`` or None.

    Returns:
        ``[B, O, H, W]`` in channels-last memory, x's dtype.
    """
    check_tensor("weight", weight, ("N", "C", "k", "k"), like=x)
    check_tensor("pointwise_weight", pointwise_weight, ("O", weight.shape[0], 1, 1), like=x)
    outputs = pointwise_weight.shape[0]
    if pointwise_bias is not None:
        check_tensor("pointwise_bias", pointwise_bias, (outputs,), like=x)
        check_same_dtype(x=x, pointwise_bias=pointwise_bias)
    check_same_dtype(x=x, pointwise_weight=pointwise_weight)
    _check(x, weight, bias, residual, outputs)
    _refuse_gradients(
        "conv2d_pointwise_channels_last",
        *(x, weight, bias, pointwise_weight, pointwise_bias, residual),
    )
    unfit = _unfit(x, weight, outputs) or rows_unfit(pointwise_weight=pointwise_weight)
    if weight.shape[0] > KERNEL_HIDDEN:
        unfit = (
            f"the kernel takes up to {KERNEL_HIDDEN} hidden channels, and weight has "
            f"{weight.shape[0]}"
        )
    match choose("conv2d_pointwise_channels_last", impl, x, unfit):
        case "triton":
            from .._convolution import ops

            return ops.conv_pointwise_forward(
                x, weight, bias, pointwise_weight, pointwise_bias, residual, gain, relu_output
            )
        case "reference":
            return reference.conv2d_pointwise_channels_last(
                x,
                weight,
                bias,
                pointwise_weight,
                pointwise_bias,
                residual=residual,
                gain=gain,
                relu_output=relu_output,
            )


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, outputs: int
) -> None:
    check_tensor("x", x, ("B", "C", "H", "W"))
    check_tensor("weight", weight, ("O", x.shape[1], "k", "k"), like=x)
    side = weight.shape[-1]
    if weight.shape[-2] != side or side % 2 == 0:
        raise ValueError(
            f"weight must be square with an odd side, got {weight.shape[-2]} x {side}: other "
            "convolutions move or change the size of what they read"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight must not be empty, got {list(weight.shape)}")
    named = {"x": x, "weight": weight}
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), like=x)
        named["bias"] = bias
    if residual is not None:
        check_tensor("residual", residual, (x.shape[0], outputs, *x.shape[2:]), like=x)
        named["residual"] = residual
    check_same_dtype(**named)


def _refuse_gradients(operation: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            f"{operation} has no gradient, and an argument requires one: call it under "
            "torch.no_grad(), or detach the argument; for training use torch.nn.functional.conv2d"
        )


def _unfit(x: Tensor, weight: Tensor, outputs: int) -> str | None:
    if max(weight.numel(), x.shape[2] * x.shape[3]) > LARGEST_INT32:
        return "the kernels take filters and images of up to 2**31 - 1 numbers and pixels"
    row = x.shape[3] * max(x.shape[1], outputs)
    if row > LARGEST_ROW:
        return f"the kernels take rows of up to {LARGEST_ROW} numbers, and one has {row}"
    if weight.shape[-1] > LARGEST_SIDE:
        return f"the kernels take filters of up to {LARGEST_SIDE} x {LARGEST_SIDE} pixels"
    return rows_unfit(x=x, weight=weight)
