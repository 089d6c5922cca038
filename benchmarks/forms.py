"""Ways to compute attention with an additive bias, ours included, as functions of `Inputs`.

A form returns ``[B, Tq, H·d]`` contiguous, as the next linear layer wants it, from the leaves of
`problems.Inputs`; what copies, casts and paddings it needs on the way are part of its time. What
can't run here raises, and the reason becomes its row. Other people's libraries are imported lazily.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastbeit_kernels
from benchmarks import definition
from benchmarks.problems import Inputs, Problem

Form = Callable[[Inputs], Tensor]
# (q, k, v [B, T, H, d], bias [B or 1, H, Tq, Tk] in their dtype or None) -> [B, Tq, H, d]
Core = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Unavailable(RuntimeError):
    """A peer that can't take part, with the reason for its row."""


def ours(impl: Any) -> Callable[[Problem], Form]:
    """The public functions of fastbeit_kernels."""

    def form(problem: Problem) -> Form:
        def attend(inputs: Inputs) -> Tensor:
            leaves, grid = inputs.leaves, inputs.grid
            if problem.operation == "expand":
                return fastbeit_kernels.expand_rel_pos_bias(
                    leaves["table"], inputs.index, grid=grid, impl=impl
                )
            if problem.operation == "attention" and problem.packed:
                out = fastbeit_kernels.attention_packed(leaves["qkv"], leaves["bias"], impl=impl)
            elif problem.operation == "attention":
                q, k, v = inputs.qkv()
                out = fastbeit_kernels.attention(
                    q, k, v, leaves["bias"], query_positions=inputs.positions, impl=impl
                )
            elif problem.packed:
                out = fastbeit_kernels.rel_pos_attention_packed(
                    leaves["qkv"], leaves["table"], inputs.index, grid=grid, impl=impl
                )
            else:
                q, k, v = inputs.qkv()
                out = fastbeit_kernels.rel_pos_attention(
                    q,
                    k,
                    v,
                    leaves["table"],
                    inputs.index,
                    query_positions=inputs.positions,
                    grid=grid,
                    impl=impl,
                )
            return out.flatten(2)

        return attend

    return form


def expanded(inputs: Inputs) -> Tensor:
    """The table as PyTorch expands it best: an embedding, whose backward is one sorted sum."""
    return F.embedding(inputs.index, inputs.leaves["table"]).permute(2, 0, 1)


def indexed(inputs: Inputs) -> Tensor:
    return definition.expand(inputs.leaves["table"], inputs.index)


def expand_with(way: Form) -> Callable[[Problem], Form]:
    """Rows of a head lie together in memory afterwards, as attention reads them."""
    return lambda _: lambda inputs: way(inputs).contiguous()


def bias_of(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """``[1 or B, H, Tq, Tk]`` in the inputs' precision, from the leaf or the table."""
    bias_HTK = inputs.leaves["bias"] if "bias" in inputs.leaves else expanded(inputs)
    if inputs.positions is None:
        return bias_HTK.to(dtype)[None]
    heads, tokens, keys = bias_HTK.shape
    rows = bias_HTK.to(dtype).transpose(0, 1).reshape(tokens, heads * keys)
    picked = F.embedding(inputs.positions, rows)
    return picked.unflatten(-1, (heads, keys)).transpose(1, 2)


def from_core(core: Core, bias: bool = True) -> Callable[[Problem], Form]:
    def form(problem: Problem) -> Form:
        def attend(inputs: Inputs) -> Tensor:
            q, k, v = inputs.qkv()
            added = bias_of(inputs, q.dtype) if bias else None
            return core(q, k, v, added).flatten(2)

        return attend

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


def compiler(device_type: str) -> Callable[[Callable[..., Any]], Any]:
    """torch.compile as the peers get it. CUDA graphs are left out: the timer hides launch costs
    from nobody, and a graph's outputs are overwritten by its next run."""
    import torch._functorch.config as functorch_config

    settings: Any = functorch_config
    # A backward that is timed by itself runs many times on one saved graph.
    settings.donated_buffer = False
    # Every problem compiles the same Python functions again; beyond the limit they would be run
    # uncompiled (fullgraph makes that an error).
    limits: Any = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit = 1000
    how: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"}
    if device_type == "cpu":
        how = {"backend": "aot_eager"}
    return lambda function: torch.compile(function, fullgraph=True, dynamic=False, **how)


def compiled(form: Callable[[Problem], Form]) -> Callable[[Problem], Form]:
    """max-autotune of another form, from leaves to output."""

    def build(problem: Problem) -> Form:
        plain = form(problem)

        def flat(leaves: dict[str, Tensor], index: Tensor, positions: Tensor | None) -> Tensor:
            # dout is no input of a forward: an empty tensor stands in.
            return plain(Inputs(leaves, index, problem.grid, positions, index))

        function = None

        def attend(inputs: Inputs) -> Tensor:
            nonlocal function
            if function is None:
                function = compiler(inputs.index.device.type)(flat)
            return function(inputs.leaves, inputs.index, inputs.positions)

        return attend

    return build


def flex(problem: Problem) -> Form:
    """FlexAttention reading the fp32 bias through its score_mod; the gradient is scattered."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(inputs: Inputs) -> Tensor:
        leaves, positions = inputs.leaves, inputs.positions
        bias = leaves["bias"] if "bias" in leaves else expanded(inputs).contiguous()

        def score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            named = row if positions is None else positions[b, row]
            return score + bias[h, named, key]

        q, k, v = (x.transpose(1, 2) for x in inputs.qkv())
        return flex_attention(q, k, v, score_mod=score_mod).transpose(1, 2).flatten(2)

    if torch.cuda.is_available():
        return compiled(lambda _: attend)(problem)
    raise Unavailable("compiled FlexAttention with a trained bias needs a GPU")


def imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken build may raise anything
        raise Unavailable(f"import {module}: {type(error).__name__}: {error}") from error


def xformers(problem: Problem) -> Form:
    ops = imported("xformers.ops")

    def core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        full = padded_to_8(bias).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        return ops.memory_efficient_attention(q, k, v, attn_bias=full)

    return from_core(core)(problem)


def transformer_engine(problem: Problem) -> Form:
    """cuDNN's fused attention with its own dBias, the one backend that is left switched on."""
    if problem.subset:
        raise Unavailable("its bias is [1, H, T, T], one for all images")
    os.environ.update(NVTE_FLASH_ATTN="0", NVTE_UNFUSED_ATTN="0", NVTE_FUSED_ATTN="1")
    te = imported("transformer_engine.pytorch")
    module = te.DotProductAttention(
        problem.heads,
        problem.width,
        attention_dropout=0.0,
        qkv_format="bshd",
        attn_mask_type="no_mask",
    )

    def core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out = module(q, k, v, core_attention_bias_type="post_scale_bias", core_attention_bias=bias)
        return out.view(q.shape)

    return from_core(core)(problem)


def flash_package(module: str) -> Callable[[Problem], Form]:
    """flash_attn (FlashAttention-2) or flash_attn_interface (3); neither takes a bias."""

    def form(problem: Problem) -> Form:
        function = imported(module).flash_attn_func

        def core(q: Tensor, k: Tensor, v: Tensor, _bias: Tensor | None) -> Tensor:
            out = function(q, k, v)
            return out[0] if isinstance(out, tuple) else out

        return from_core(core, bias=False)(problem)

    return form
