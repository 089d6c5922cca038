"""The registered operators of attention, and the functions the public ones call for Triton.

Four operators: forward and backward, each for separate q, k, v and for packed qkv (an operator's
results must not share memory, so a packed gradient can't come back as three views). They are
``torch.library.custom_op``s: opaque to the compiler, with shapes and gradients registered, so that
``torch.compile(fullgraph=True)``, autocast and checkpointing see ordinary functions. Their names
derive from the package's own, so that a vendored copy under another name registers its own.

The bias comes twice: ``bias`` takes the gradient (in its own dtype) and is never read; ``read`` is
its copy in q's dtype ``[B or 1, H or 1, rows or 1, keys padded to 8]``, which the kernels read.

Shapes: B images, T tokens, H heads, d head width; r is B, H or rows of the bias, or 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._operators import NAMESPACE, refuse_second_derivative
from .run import bias_gradient_shape, reduce_bias_gradient, run_backward, run_forward


@torch.library.custom_op(f"{NAMESPACE}::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    read: Tensor | None,
    positions: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return run_forward(q, k, v, read, positions, scale)


@attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    read: Tensor | None,
    positions: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, width = q.shape
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    return q.new_empty(batch, queries, heads, width), lse


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    read: Tensor | None,
    positions: Tensor | None,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dbias = run_backward(dout, q, k, v, out, lse, read, positions, scale, dq, dk, dv, bias_gradient)
    return dq, dk, dv, dbias


@attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    read: Tensor | None,
    positions: Tensor | None,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, _fake_bias_gradient(q, k, read, positions, bias_gradient)


def _fake_bias_gradient(
    q: Tensor, k: Tensor, read: Tensor | None, positions: Tensor | None, bias_gradient: bool
) -> Tensor:
    shape = (0,)
    if bias_gradient and read is not None:
        shape = bias_gradient_shape(q, k, read, positions)
    return q.new_empty(shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, read, positions, scale = inputs
    ctx.save_for_backward(q, k, v, *output, read, positions)
    _remember(ctx, bias, scale)


def _remember(ctx: Any, bias: Tensor | None, scale: float) -> None:
    ctx.scale = scale
    ctx.bias_shape = None if bias is None else bias.shape
    ctx.bias_dtype = None if bias is None else bias.dtype


def _attention_gradients(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, read, positions = ctx.saved_tensors
    wants_bias = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = attention_backward(
        dout, q, k, v, out, lse, read, positions, ctx.scale, wants_bias
    )
    if not wants_bias:
        return dq, dk, dv, None, None, None, None
    dbias = reduce_bias_gradient(dbias, ctx.bias_shape, ctx.bias_dtype, k.shape[1])
    return dq, dk, dv, dbias, None, None, None


attention_forward.register_autograd(_attention_gradients, setup_context=_save)


@torch.library.custom_op(f"{NAMESPACE}::attention_packed_forward", mutates_args=())
def attention_packed_forward(
    qkv: Tensor, bias: Tensor | None, read: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return run_forward(q, k, v, read, None, scale)


@attention_packed_forward.register_fake
def _(qkv: Tensor, bias: Tensor | None, read: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    lse = qkv.new_empty(batch, heads, tokens, dtype=torch.float32)
    return qkv.new_empty(batch, tokens, heads, width), lse


@torch.library.custom_op(f"{NAMESPACE}::attention_packed_backward", mutates_args=())
def attention_packed_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    read: Tensor | None,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = qkv.unbind(2)
    dq, dk, dv = dqkv.unbind(2)
    dbias = run_backward(dout, q, k, v, out, lse, read, None, scale, dq, dk, dv, bias_gradient)
    return dqkv, dbias


@attention_packed_backward.register_fake
def _(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    read: Tensor | None,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.unbind(2)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    return dqkv, _fake_bias_gradient(q, k, read, None, bias_gradient)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, read, scale = inputs
    ctx.save_for_backward(qkv, *output, read)
    _remember(ctx, bias, scale)


def _packed_gradients(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, out, lse, read = ctx.saved_tensors
    wants_bias = ctx.needs_input_grad[1]
    dqkv, dbias = attention_packed_backward(dout, qkv, out, lse, read, ctx.scale, wants_bias)
    if not wants_bias:
        return dqkv, None, None, None
    dbias = reduce_bias_gradient(dbias, ctx.bias_shape, ctx.bias_dtype, qkv.shape[1])
    return dqkv, dbias, None, None


attention_packed_forward.register_autograd(_packed_gradients, setup_context=_save_packed)


refuse_second_derivative("attention", attention_backward, attention_packed_backward)


def _readable(bias: Tensor | None, dtype: torch.dtype, keys: int) -> Tensor | None:
    """The copy that kernels read. Made outside the operators, so that a compiled graph of many
    blocks that share a bias makes it once."""
    if bias is None:
        return None
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    read = torch.empty(*shape[:3], -(-keys // 8) * 8, dtype=dtype, device=bias.device)
    read[..., :keys] = bias.detach().reshape(shape)
    return read


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, in its dtype, as matrix products are; the bias stays as it is."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    query_positions: Tensor | None,
    scale: float | None,
) -> Tensor:
    """The public function of that name, on Triton; arguments are checked."""
    q, k, v = _autocast(q, k, v)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    positions = None if query_positions is None else query_positions.to(torch.int32).contiguous()
    read = _readable(bias, q.dtype, k.shape[1])
    return attention_forward(q, k, v, bias, read, positions, factor)[0]


def attention_packed(qkv: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    (qkv,) = _autocast(qkv)
    factor = qkv.shape[-1] ** -0.5 if scale is None else scale
    read = _readable(bias, qkv.dtype, qkv.shape[1])
    return attention_packed_forward(qkv, bias, read, factor)[0]
