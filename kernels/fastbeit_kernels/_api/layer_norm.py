"""Residual, LayerScale, DropPath and LayerNorm in one pass."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .._checks import check_tensor, rows_unfit
from .._dispatch import Impl, choose

KERNEL_ROW_WIDTH = 8192


def scale_residual_layer_norm(
    x: Tensor,
    branch: Tensor | None = None,
    *,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-6,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """y = x + drop_scale * gamma * branch; normed = LayerNorm(y).

    Args:
        x: ``[B, T, D]``, the residual stream.
        branch: ``[B, T, D]`` or None (then y is x, and gamma and drop_scale must be None).
        weight, bias: ``[D]``, of the LayerNorm; bias may be None.
        gamma: ``[D]`` LayerScale, or None.
        drop_scale: ``[B]`` DropPath factor of each image (0 or 1/keep), or None.

    Every tensor may have a dtype of its own: the kernels compute in fp32, round y once, to x's
    dtype, and norm the rounded y. They take rows of up to 8192 elements, and give drop_scale, which
    is data, no gradient; the reference does.

    Returns:
        (y, normed), both ``[B, T, D]`` in x's dtype, under autocast too; means and variances are
        fp32. Without a branch y is x itself.
    """
    _check_residual(x, branch, gamma, drop_scale)
    check_tensor("weight", weight, (x.shape[-1],), like=x)
    if bias is not None:
        check_tensor("bias", bias, (x.shape[-1],), like=x)
    unfit = _unfit(x, drop_scale, branch=branch, weight=weight, bias=bias, gamma=gamma)
    match choose("scale_residual_layer_norm", impl, x, unfit):
        case "triton":
            from .._layer_norm import ops

            return ops.scale_residual_layer_norm(x, branch, weight, bias, eps, gamma, drop_scale)
        case "reference":
            return reference.scale_residual_layer_norm(
                x, branch, weight=weight, bias=bias, eps=eps, gamma=gamma, drop_scale=drop_scale
            )


def scale_residual(
    x: Tensor,
    branch: Tensor,
    *,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """x + drop_scale * gamma * branch, for want of a LayerNorm behind it; shapes as above."""
    _check_residual(x, branch, gamma, drop_scale)
    unfit = _unfit(x, drop_scale, branch=branch, gamma=gamma)
    match choose("scale_residual", impl, x, unfit):
        case "triton":
            from .._layer_norm import ops

            return ops.scale_residual(x, branch, gamma, drop_scale)
        case "reference":
            return reference.scale_residual(x, branch, gamma=gamma, drop_scale=drop_scale)


def _unfit(x: Tensor, drop_scale: Tensor | None, **others: Tensor | None) -> str | None:
    """Why the kernels can't take these tensors; None if they can."""
    width = x.shape[-1]
    if width > KERNEL_ROW_WIDTH:
        return f"the kernels take rows of up to {KERNEL_ROW_WIDTH} elements, and x's have {width}"
    if drop_scale is not None and drop_scale.requires_grad:
        return "the kernels give drop_scale no gradient, and drop_scale requires one"
    return rows_unfit(x=x, drop_scale=drop_scale, **others)


def _check_residual(
    x: Tensor, branch: Tensor | None, gamma: Tensor | None, drop_scale: Tensor | None
) -> None:
    check_tensor("x", x, ("B", "T", "D"))
    batch, tokens, width = x.shape
    if branch is None:
        if gamma is not None or drop_scale is not None:
            raise ValueError("gamma and drop_scale scale the branch, but branch is None")
        return
    check_tensor("branch", branch, (batch, tokens, width), like=x)
    if gamma is not None:
        check_tensor("gamma", gamma, (width,), like=x)
    if drop_scale is not None:
        check_tensor("drop_scale", drop_scale, (batch,), like=x)
