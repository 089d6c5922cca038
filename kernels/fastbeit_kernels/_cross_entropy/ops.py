"""The registered operators of ``masked_linear_cross_entropy``.

The forward computes the gradient with the loss, while the logits are on chip, and returns it with
the matrix of masked rows: autograd keeps these until the backward. They are made only where a
gradient is wanted, which the caller sees and the operator is told. The logits belong to the
forward, so that writing the gradient over them is nobody's concern, and the backward writes over
nothing: it may run twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._operators import NAMESPACE, refuse_second_derivative
from ..reference import MimLoss
from .run import empty_forward, run_backward, run_forward

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op(f"{NAMESPACE}::masked_loss_forward", mutates_args=())
def masked_loss_forward(
    hidden: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    smoothing: float,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wants = (wants_hidden, wants_weight, wants_bias)
    return run_forward(hidden, positions, weight, bias, targets, smoothing, wants)


@masked_loss_forward.register_fake
def _(
    hidden: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    smoothing: float,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> Tensors:
    wants = (wants_hidden, wants_weight, wants_bias)
    return empty_forward(hidden, targets, weight.shape[0], wants)


@torch.library.custom_op(f"{NAMESPACE}::masked_loss_backward", mutates_args=())
def masked_loss_backward(
    dloss: Tensor,
    count: Tensor,
    gradient: Tensor,
    rows: Tensor,
    sources: Tensor,
    dbias: Tensor,
    weight: Tensor,
    images: int,
    tokens: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    found = _empty_gradients(weight, images, tokens, (wants_hidden, wants_weight, wants_bias))
    run_backward(dloss, count, gradient, rows, sources, dbias, weight, *found)
    return found


def _empty_gradients(
    weight: Tensor, images: int, tokens: int, wants: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    classes, width = weight.shape
    shapes = ((images, tokens, width), (classes, width), (classes,))
    hidden, weights, bias = (
        torch.empty(shape if wanted else (0,), dtype=weight.dtype, device=weight.device)
        for shape, wanted in zip(shapes, wants, strict=True)
    )
    return hidden, weights, bias


@masked_loss_backward.register_fake
def _(
    dloss: Tensor,
    count: Tensor,
    gradient: Tensor,
    rows: Tensor,
    sources: Tensor,
    dbias: Tensor,
    weight: Tensor,
    images: int,
    tokens: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(weight, images, tokens, (wants_hidden, wants_weight, wants_bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    hidden, _, weight = inputs[:3]
    _, _, count, *kept = output
    ctx.mark_non_differentiable(*output[1:])
    # Else the missing gradient of the gradient would come as a matrix of zeros, as large as logits.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(count, *kept, weight)
    ctx.images, ctx.tokens = hidden.shape[:2]


def _loss_gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 9
    wanted = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
    found = masked_loss_backward(dloss, *ctx.saved_tensors, ctx.images, ctx.tokens, *wanted)
    dhidden, dweight, dbias = (
        one if wants else None for one, wants in zip(found, wanted, strict=True)
    )
    return dhidden, None, dweight, dbias, None, None, None, None, None


masked_loss_forward.register_autograd(_loss_gradients, setup_context=_save)


refuse_second_derivative("masked_linear_cross_entropy", masked_loss_backward)


def masked_linear_cross_entropy(
    hidden: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
) -> MimLoss:
    """The public function of that name, on Triton; arguments are checked."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        # As a matrix product's.
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    learning = torch.is_grad_enabled()
    wants = [
        learning and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    found = masked_loss_forward(hidden, positions, weight, bias, targets, label_smoothing, *wants)
    return MimLoss(*found[:3])
