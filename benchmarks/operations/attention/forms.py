"""Ways to compute attention with an additive bias, ours included.

A form ends at ``[B, Tq, H, d]`` contiguous, as the next linear layer wants it, from the leaves of
the call; what copies, casts and paddings it needs on the way are part of its time. What can't run
here raises, and the reason becomes its row. Other people's libraries are imported lazily.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastbeit_kernels
from benchmarks.call import Call, Function, Outputs
from benchmarks.operations.attention import definition
from benchmarks.operations.attention.shapes import Attention, qkv
from benchmarks.peers import Unavailable, compiled, imported

Form = Callable[[Attention], Function]
# (q, k, v [B, T, H, d], bias [B or 1, H, Tq, Tk] in their dtype or None) -> [B, Tq, H, d]
Core = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def ours(impl: Any) -> Function:
    """The public functions of fastbeit_kernels."""

    def function(call: Call) -> Outputs:
        leaves, given, shape = call.leaves, call.given, call.shape
        positions = given.get("positions")
        match shape.kind:
            case "expand":
                out = fastbeit_kernels.expand_rel_pos_bias(
                    leaves["table"], given["index"], grid=shape.grid, impl=impl
                )
            case "packed":
                out = fastbeit_kernels.attention_packed(
                    leaves["qkv"], leaves.get("bias"), impl=impl
                )
            case "packed table":
                out = fastbeit_kernels.rel_pos_attention_packed(
                    leaves["qkv"], leaves["table"], given["index"], grid=shape.grid, impl=impl
                )
            case "table":
                out = fastbeit_kernels.rel_pos_attention(
                    *qkv(call),
                    leaves["table"],
                    given["index"],
                    query_positions=positions,
                    grid=shape.grid,
                    impl=impl,
                )
            case _:
                out = fastbeit_kernels.attention(
                    *qkv(call), leaves.get("bias"), query_positions=positions, impl=impl
                )
        return {"out": out}

    return function


def by_definition(call: Call) -> Outputs:
    """The formulas, in the inputs' own precision."""
    bias = call.optional("bias")
    table = call.optional("table")
    if table is not None:
        bias = definition.expand(table, call.given["index"])
    if call.shape.expands:
        assert bias is not None
        return {"out": bias}
    return {"out": definition.attention(*qkv(call), bias, call.given.get("positions"))}


def expanded(call: Call) -> Tensor:
    """The table as PyTorch expands it best: an embedding, whose backward is one sorted sum."""
    return F.embedding(call.given["index"], call.tensor("table")).permute(2, 0, 1)


def indexed(call: Call) -> Tensor:
    return definition.expand(call.tensor("table"), call.given["index"])


def expand_with(way: Callable[[Call], Tensor]) -> Form:
    """Rows of a head lie together in memory afterwards, as attention reads them."""
    return lambda _: lambda call: {"out": way(call).contiguous()}


def bias_of(call: Call, dtype: torch.dtype) -> Tensor:
    """``[1 or B, H, Tq, Tk]`` in the inputs' precision, from the leaf or the table."""
    bias_HTK = call.optional("bias")
    if bias_HTK is None:
        bias_HTK = expanded(call)
    positions = call.given.get("positions")
    if positions is None:
        return bias_HTK.to(dtype)[None]
    heads, tokens, keys = bias_HTK.shape
    rows = bias_HTK.to(dtype).transpose(0, 1).reshape(tokens, heads * keys)
    picked = F.embedding(positions, rows)
    return picked.unflatten(-1, (heads, keys)).transpose(1, 2)


def from_core(core: Core, bias: bool = True) -> Form:
    def form(_shape: Attention) -> Function:
        def function(call: Call) -> Outputs:
            q, k, v = qkv(call)
            added = bias_of(call, q.dtype) if bias else None
            return {"out": core(q, k, v, added).contiguous()}

        return function

    return form


def eager_core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """As ViTs wrote it before fused attention: three steps, the softmax in fp32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return (torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


def padded_to_8(bias: Tensor) -> Tensor:
    """Same values, memory rows a multiple of 8 apart (197 → 200): fused kernels ask for that."""
    keys = bias.shape[-1]
    return F.pad(bias, (0, -keys % 8))[..., :keys]


def sdpa_core(backend: SDPBackend | None) -> Core:
    def core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            bias = padded_to_8(bias).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            with sdpa_kernel([backend]):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.transpose(1, 2)

    return core


def flex(shape: Attention) -> Function:
    """FlexAttention reading the fp32 bias through its score_mod; the gradient is scattered."""
    from torch.nn.attention.flex_attention import flex_attention

    def function(call: Call) -> Outputs:
        positions, held = call.given.get("positions"), call.optional("bias")
        bias = expanded(call).contiguous() if held is None else held

        def score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            named = row if positions is None else positions[b, row]
            return score + bias[h, named, key]

        q, k, v = (x.transpose(1, 2) for x in qkv(call))
        out = flex_attention(q, k, v, score_mod=score_mod)
        assert isinstance(out, Tensor)
        return {"out": out.transpose(1, 2).contiguous()}

    if torch.cuda.is_available():
        return compiled(lambda _: function)(shape)
    raise Unavailable("compiled FlexAttention with a trained bias needs a GPU")


def xformers(shape: Attention) -> Function:
    ops = imported("xformers.ops")

    def core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        full = padded_to_8(bias).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        return ops.memory_efficient_attention(q, k, v, attn_bias=full)

    return from_core(core)(shape)


def transformer_engine(shape: Attention) -> Function:
    """cuDNN's fused attention with its own dBias, the one backend that is left switched on."""
    if shape.subset:
        raise Unavailable("its bias is [1, H, T, T], one for all images")
    os.environ.update(NVTE_FLASH_ATTN="0", NVTE_UNFUSED_ATTN="0", NVTE_FUSED_ATTN="1")
    te = imported("transformer_engine.pytorch")
    module = te.DotProductAttention(
        shape.heads,
        shape.width,
        attention_dropout=0.0,
        qkv_format="bshd",
        attn_mask_type="no_mask",
    )

    def core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out = module(q, k, v, core_attention_bias_type="post_scale_bias", core_attention_bias=bias)
        return out.view(q.shape)

    return from_core(core)(shape)


def flash_package(module: str) -> Form:
    """flash_attn (FlashAttention-2) or flash_attn_interface (3); neither takes a bias."""

    def form(shape: Attention) -> Function:
        function = imported(module).flash_attn_func

        def core(q: Tensor, k: Tensor, v: Tensor, _bias: Tensor | None) -> Tensor:
            out = function(q, k, v)
            return out[0] if isinstance(out, tuple) else out

        return from_core(core, bias=False)(shape)

    return form
