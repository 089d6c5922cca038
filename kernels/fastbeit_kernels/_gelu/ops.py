"""The registered operators of ``bias_gelu``: forward, and a backward that gives both gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch import on_device
from .._operators import NAMESPACE, refuse_second_derivative
from . import arguments


@torch.library.custom_op(f"{NAMESPACE}::bias_gelu_forward", mutates_args=())
def bias_gelu_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    flat = arguments.rows_of(x)
    with on_device(x):
        arguments.forward_launch(flat, bias, out.view(flat.shape), arguments.config_of(x)).run()
    return out


@bias_gelu_forward.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op(f"{NAMESPACE}::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """dx, and dbias in bias's dtype, or an empty tensor where it is not asked for."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    flat, config = arguments.rows_of(x), arguments.config_of(x)
    shares = None
    dbias = torch.empty(0, dtype=x.dtype, device=x.device)
    if bias_gradient and bias is not None:
        size = (arguments.stretches(flat, config), flat.shape[1])
        shares = torch.empty(size, dtype=torch.float32, device=x.device)
        dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    with on_device(x):
        arguments.backward_launch(
            arguments.rows_of(dout), flat, bias, dx.view(flat.shape), shares, config
        ).run()
        if shares is not None:
            arguments.sum_launch(shares, dbias).run()
    return dx, dbias


@bias_gelu_backward.register_fake
def _(dout: Tensor, x: Tensor, bias: Tensor | None, bias_gradient: bool) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if bias_gradient and bias is not None:
        return dx, torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    return dx, torch.empty(0, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, bias = ctx.saved_tensors
    wants_bias = ctx.needs_input_grad[1]
    dx, dbias = bias_gelu_backward(dout, x, bias, wants_bias)
    return dx if ctx.needs_input_grad[0] else None, dbias if wants_bias else None


bias_gelu_forward.register_autograd(_gradients, setup_context=_save)
refuse_second_derivative("bias_gelu", bias_gelu_backward)


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """The public function of that name, on Triton; arguments are checked."""
    return bias_gelu_forward(x, bias)
