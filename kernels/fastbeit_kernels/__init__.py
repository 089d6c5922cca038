"""The operations of a BEiT step: biased attention, residual + LayerNorm, masked loss, argmax head.

They need torch alone, know nothing of fastbeit, and serve any ViT. ``reference.py`` is their
specification in plain PyTorch. ``impl="triton"`` takes a Triton kernel (an NVIDIA GPU of compute
capability 8.0 or newer; on a CPU TRITON_INTERPRET=1) or fails, and never silently falls back;
``impl="reference"`` takes the reference; ``impl="auto"`` the better of the two, which is the
reference until the kernels, for attention and for expand_rel_pos_bias, have been shown right and
faster on a GPU. Wrong shapes, dtypes and devices raise ValueError. Importing this package queries
no GPU and imports no Triton.

Shapes: B batch, T tokens, Tq queries, Tk keys, H heads, d head width, D width, M slots, V classes.
Positions index rows of what they are given (tokens, CLS included); -1 marks an empty slot, whose
row comes back zero and takes no gradient.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import reference
from ._checks import (
    INTEGERS,
    attention_unfit,
    check_attention,
    check_impl,
    check_relative,
    check_tensor,
    expand_unfit,
)
from ._dispatch import choose
from .reference import MimLoss

Impl = Literal["auto", "triton", "reference"]

__all__ = [
    "Impl",
    "MimLoss",
    "attention",
    "attention_packed",
    "expand_rel_pos_bias",
    "linear_argmax",
    "masked_linear_cross_entropy",
    "rel_pos_attention",
    "rel_pos_attention_packed",
    "scale_residual",
    "scale_residual_layer_norm",
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """softmax(scale * Q Kᵀ + bias) V, with the gradient of the bias.

    Args:
        q: ``[B, Tq, H, d]`` fp32, fp16, bf16 or fp64; strided views are fine, as for k and v.
        k, v: ``[B, Tk, H, d]``, dtype and device of q.
        bias: broadcastable to ``[B, H, Tq, Tk]``, any floating dtype, which is its gradient's too.
        query_positions: ``[B, Tq]`` integers. Then bias is ``[H, T, Tk]`` and its row
            ``query_positions[b, i]`` serves query i of image b; -1 is an empty slot.
        scale: ``d ** -0.5`` when None.

    Returns:
        ``[B, Tq, H, d]`` in q's dtype. The softmax is fp32; with 16-bit inputs on a GPU the bias is
        read in 16 bits (its gradient is summed in fp32). Under autocast q, k and v are cast, the
        bias isn't. The kernels give a row of scores that are all -inf an output of zero.

    The kernels take heads up to 128 wide and no fp64 (``impl="auto"``: the reference does), have no
    second derivative, and give bitwise the same gradients in every run.
    """
    check_attention(q, k, v, bias, query_positions)
    match choose("attention", impl, q, attention_unfit(q, k)):
        case "triton":
            from ._attention import ops

            return ops.attention(q, k, v, bias, query_positions, scale)
        case "reference":
            return reference.attention(q, k, v, bias, query_positions=query_positions, scale=scale)


def attention_packed(
    qkv: Tensor, bias: Tensor | None = None, *, scale: float | None = None, impl: Impl = "auto"
) -> Tensor:
    """:func:`attention` of ``qkv [B, T, 3, H, d]`` → ``[B, T, H, d]``; the gradient is packed."""
    check_tensor("qkv", qkv, ("B", "T", 3, "H", "d"))
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    check_attention(q, k, v, bias, None)
    match choose("attention_packed", impl, qkv, attention_unfit(q, k)):
        case "triton":
            from ._attention import ops

            return ops.attention_packed(qkv, bias, scale)
        case "reference":
            return reference.attention_packed(qkv, bias, scale=scale)


def expand_rel_pos_bias(
    table: Tensor,
    index: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Relative table ``[R, H]`` and index ``[T, T]`` → bias fp32 ``[H, T, T]``.

    Memory rows are a multiple of 8 elements apart, so the result is not contiguous. Its backward
    reduces to the table once, in a fixed order. ``grid`` (h, w) is a promise that the index is that
    of an h x w window, rows first, with CLS before it and its three table rows behind the
    offsets', as BEiT has it: then the backward kernel knows where each table row went. The promise
    isn't checked (that would wait for the device); the values don't depend on it.
    """
    check_relative(table, index, grid)
    match choose("expand_rel_pos_bias", impl, table, expand_unfit(table, index)):
        case "triton":
            from ._rel_pos_bias import ops

            return ops.expand_rel_pos_bias(table, index, grid)
        case "reference":
            return reference.expand_rel_pos_bias(table, index, grid=grid)


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    index: Tensor,
    *,
    query_positions: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """:func:`expand_rel_pos_bias`, then :func:`attention`."""
    check_tensor("q", q, ("B", "Tq", "H", "d"))
    check_relative(table, index, grid, q.shape[2])
    unfit = attention_unfit(q, k) or expand_unfit(table, index)
    impl = choose("rel_pos_attention", impl, q, unfit)
    bias = expand_rel_pos_bias(table, index, grid=grid, impl=impl)
    return attention(q, k, v, bias, query_positions=query_positions, scale=scale, impl=impl)


def rel_pos_attention_packed(
    qkv: Tensor,
    table: Tensor,
    index: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """:func:`expand_rel_pos_bias`, then :func:`attention_packed`."""
    check_tensor("qkv", qkv, ("B", "T", 3, "H", "d"))
    check_relative(table, index, grid, qkv.shape[3])
    unfit = attention_unfit(qkv[:, :, 0], qkv[:, :, 1]) or expand_unfit(table, index)
    impl = choose("rel_pos_attention_packed", impl, qkv, unfit)
    bias = expand_rel_pos_bias(table, index, grid=grid, impl=impl)
    return attention_packed(qkv, bias, scale=scale, impl=impl)


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

    Returns:
        (y, normed), both ``[B, T, D]`` in x's dtype; means and variances are fp32.
    """
    check_impl("scale_residual_layer_norm", impl)
    _check_residual(x, branch, gamma, drop_scale)
    check_tensor("weight", weight, (x.shape[-1],), like=x)
    if bias is not None:
        check_tensor("bias", bias, (x.shape[-1],), like=x)
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
    check_impl("scale_residual", impl)
    _check_residual(x, branch, gamma, drop_scale)
    return reference.scale_residual(x, branch, gamma=gamma, drop_scale=drop_scale)


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


def masked_linear_cross_entropy(
    hidden: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    impl: Impl = "auto",
) -> MimLoss:
    """Cross-entropy of a linear head at chosen rows, without a logits row for any other.

    Args:
        hidden: ``[B, T, D]``; or, with positions None, ``[B, M, D]``: rows already selected.
        positions: ``[B, M]`` integers, rows of hidden, -1 for an empty slot; or None.
        weight, bias: ``[V, D]`` and ``[V]`` or None.
        targets: ``[B, M]`` int64 class numbers. Not read where positions is -1; a negative target
            empties its slot.

    Returns:
        MimLoss(loss, correct, count): the mean in nats over filled slots (0 if none), how many of
        them the argmax gets right, how many there are. Device scalars; nothing waits.
    """
    check_impl("masked_linear_cross_entropy", impl)
    check_tensor("hidden", hidden, ("B", "T" if positions is not None else "M", "D"))
    batch, rows, width = hidden.shape
    slots: int | str = rows
    if positions is not None:
        check_tensor("positions", positions, (batch, "M"), dtypes=INTEGERS, like=hidden)
        slots = positions.shape[1]
    check_tensor("targets", targets, (batch, slots), dtypes=INTEGERS, like=hidden)
    check_tensor("weight", weight, ("V", width), like=hidden)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), like=hidden)
    return reference.masked_linear_cross_entropy(hidden, positions, weight, bias, targets)


def linear_argmax(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """argmax over V of ``x [R, D] @ weight [V, D].T + bias [V]`` → int64 ``[R]``; no gradient.

    Scores are compared in fp32, whatever the inputs' dtype; ties go to the lowest index.
    """
    check_impl("linear_argmax", impl)
    check_tensor("x", x, ("R", "D"))
    check_tensor("weight", weight, ("V", x.shape[1]), like=x)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), like=x)
    return reference.linear_argmax(x, weight, bias)
