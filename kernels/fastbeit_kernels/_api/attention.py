"""Attention with a trained bias, and the relative table that the bias is expanded from."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .._checks import (
    attention_unfit,
    check_attention,
    check_relative,
    check_tensor,
    expand_unfit,
)
from .._dispatch import Impl, choose


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
            from .._attention import ops

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
            from .._attention import ops

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
            from .._rel_pos_bias import ops

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
