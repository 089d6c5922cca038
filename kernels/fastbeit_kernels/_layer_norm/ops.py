"""The registered operators of residual and norm, and the functions the public ones call for Triton.

Three forward operators over one kernel (residual and norm, norm alone, residual alone: an operator
must not return its input, so y can't be a result where there is no branch) and one backward. They
are ``torch.library.custom_op``s, named after the package (``_operators.py``).

The backward operator takes the dtype of each gradient that is wanted, or None, and returns those
alone. drop_scale is data and has none. branch is kept for the backward pass only if gamma learns.

Shapes: B images, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._operators import NAMESPACE, refuse_second_derivative
from .run import gradients_like, like, run_backward, run_forward

Gradients = list[Tensor | None]


@torch.library.custom_op(f"{NAMESPACE}::residual_norm_forward", mutates_args=())
def residual_norm_forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, normed, mean, rstd = run_forward(x, branch, weight, bias, eps, gamma, drop_scale)
    assert y is not None and normed is not None and mean is not None and rstd is not None
    return y, normed, mean, rstd


@residual_norm_forward.register_fake
def _(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return like(x), like(x), *_fake_statistics(x)


@torch.library.custom_op(f"{NAMESPACE}::norm_forward", mutates_args=())
def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, normed, mean, rstd = run_forward(x, None, weight, bias, eps, None, None)
    assert normed is not None and mean is not None and rstd is not None
    return normed, mean, rstd


@norm_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), *_fake_statistics(x)


@torch.library.custom_op(f"{NAMESPACE}::residual_forward", mutates_args=())
def residual_forward(
    x: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None
) -> Tensor:
    y = run_forward(x, branch, None, None, 0.0, gamma, drop_scale)[0]
    assert y is not None
    return y


@residual_forward.register_fake
def _(x: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None) -> Tensor:
    return like(x)


def _fake_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in "mr")
    return mean, rstd


@torch.library.custom_op(f"{NAMESPACE}::residual_norm_backward", mutates_args=())
def residual_norm_backward(
    dy: Tensor | None,
    dnormed: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    x_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
    gamma_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    dtypes = (x_dtype, branch_dtype, gamma_dtype, weight_dtype, bias_dtype)
    return run_backward(dy, dnormed, y, mean, rstd, weight, branch, gamma, drop_scale, *dtypes)


@residual_norm_backward.register_fake
def _(
    dy: Tensor | None,
    dnormed: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    x_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
    gamma_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    came = dy if dnormed is None else dnormed
    assert came is not None
    dtypes = (x_dtype, branch_dtype, gamma_dtype, weight_dtype, bias_dtype)
    return [gradient for gradient in gradients_like(came, *dtypes) if gradient is not None]


refuse_second_derivative("scale_residual_layer_norm", residual_norm_backward)


def _remember(
    ctx: Any,
    learners: tuple[tuple[int, Tensor | None], ...],
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
) -> None:
    """``learners``: x, branch, gamma, weight, bias with their places among the operator's inputs
    (-1: not one of them)."""
    ctx.dtypes = [
        tensor.dtype if tensor is not None and place >= 0 and ctx.needs_input_grad[place] else None
        for place, tensor in learners
    ]
    kept = branch if ctx.dtypes[2] is not None else None
    ctx.unscaled = gamma is None and drop_scale is None
    ctx.stream_dtype = None if learners[0][1] is None else learners[0][1].dtype
    ctx.save_for_backward(y, mean, rstd, weight, kept, gamma, drop_scale)
    # A result without a gradient is told from one whose gradient is zero, and is not read.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dnormed: Tensor | None) -> Gradients:
    """[dx, dbranch, dgamma, dweight, dbias], None where there is none or nobody asked."""
    if dy is None and dnormed is None:
        return [None] * 5
    y, mean, rstd, weight, branch, gamma, drop_scale = ctx.saved_tensors
    wanted = list(ctx.dtypes)
    found: Gradients = [None] * 5
    # Without a factor the branch's gradient is x's, and so it need not be written twice.
    shared = ctx.unscaled and wanted[1] == ctx.stream_dtype and wanted[1] is not None
    if shared:
        wanted[:2] = [ctx.stream_dtype, None]
    if dnormed is None:
        # Through the residual alone dx is dy, and the norm's parameters had no part in it.
        y = mean = rstd = weight = None
        found[0] = dy if wanted[0] is not None else None
        wanted[0] = wanted[3] = wanted[4] = None
    if any(dtype is not None for dtype in wanted):
        new = residual_norm_backward(
            dy, dnormed, y, mean, rstd, weight, branch, gamma, drop_scale, *wanted
        )
        rest = iter(new)
        found = [
            before if dtype is None else next(rest)
            for before, dtype in zip(found, wanted, strict=True)
        ]
    if shared:
        found[1] = found[0]
        found[0] = None if ctx.dtypes[0] is None else found[0]
    return found


def _save_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, weight, bias, _eps, gamma, drop_scale = inputs
    y, _, mean, rstd = output
    learners = ((0, x), (1, branch), (5, gamma), (2, weight), (3, bias))
    _remember(ctx, learners, y, mean, rstd, weight, branch, gamma, drop_scale)
    ctx.mark_non_differentiable(mean, rstd)


def _residual_norm_gradients(
    ctx: Any, dy: Tensor | None, dnormed: Tensor | None, _dmean: None, _drstd: None
) -> tuple[Tensor | None, ...]:
    dx, dbranch, dgamma, dweight, dbias = _gradients(ctx, dy, dnormed)
    return dx, dbranch, dweight, dbias, None, dgamma, None


residual_norm_forward.register_autograd(_residual_norm_gradients, setup_context=_save_residual_norm)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _eps = inputs
    _, mean, rstd = output
    learners = ((0, x), (-1, None), (-1, None), (1, weight), (2, bias))
    _remember(ctx, learners, x, mean, rstd, weight, None, None, None)
    ctx.mark_non_differentiable(mean, rstd)


def _norm_gradients(
    ctx: Any, dnormed: Tensor | None, _dmean: None, _drstd: None
) -> tuple[Tensor | None, ...]:
    dx, _, _, dweight, dbias = _gradients(ctx, None, dnormed)
    return dx, dweight, dbias, None


norm_forward.register_autograd(_norm_gradients, setup_context=_save_norm)


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, branch, gamma, drop_scale = inputs
    learners = ((0, x), (1, branch), (2, gamma), (-1, None), (-1, None))
    _remember(ctx, learners, None, None, None, None, branch, gamma, drop_scale)


def _residual_gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dbranch, dgamma, _, _ = _gradients(ctx, dy, None)
    return dx, dbranch, dgamma, None


residual_forward.register_autograd(_residual_gradients, setup_context=_save_residual)


def scale_residual_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The public function of that name, on Triton; arguments are checked."""
    if branch is None:
        return x, norm_forward(x, weight, bias, eps)[0]
    return residual_norm_forward(x, branch, weight, bias, eps, gamma, drop_scale)[:2]


def scale_residual(
    x: Tensor, branch: Tensor, gamma: Tensor | None, drop_scale: Tensor | None
) -> Tensor:
    return residual_forward(x, branch, gamma, drop_scale)
