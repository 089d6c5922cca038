"""Attention with a trained bias, by name: the kernels', PyTorch's two, xformers'.

``triton`` and ``reference`` are :func:`fastbeit_kernels.attention`; ``sdpa``, ``flex`` and
``xformers`` do the same by other means, for machines or versions where they are ahead. They know no
empty slots and, but for flex, no subset of a bias: its rows are picked before, rows of empty slots
zeroed after. As in the reference on a GPU, their bias and its gradient have q's dtype; the sum over
images is the library's, and flex's is by float atomics, which don't repeat bit by bit.

Shapes: B batch, T tokens, Tq queries, Tk keys (Tk8 padded to a multiple of 8), H heads, d head
width.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit.model.backends import AttentionName
from fastbeit_kernels import attention, attention_packed


def attend(
    name: AttentionName,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    query_positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`fastbeit_kernels.attention` by the backend called ``name``.

    Args:
        q: ``[B, Tq, H, d]``; k, v ``[B, Tk, H, d]``.
        bias: ``[H, Tq, Tk]``, or ``[H, T, Tk]`` with query_positions, or None.
        query_positions: ``[B, Tq]`` the bias's row of each query; -1 in empty slots, whose rows
            come back zero.
        scale: ``d ** -0.5`` when None.

    Returns:
        ``[B, Tq, H, d]``.
    """
    match name:
        case "auto" | "triton" | "reference":
            return attention(q, k, v, bias, query_positions=query_positions, scale=scale, impl=name)
        case "sdpa":
            out = sdpa(q, k, v, bias, query_positions, scale)
        case "flex":
            out = flex(q, k, v, bias, query_positions, scale)
        case "xformers":
            out = xformers(q, k, v, bias, query_positions, scale)
        case _:
            raise ValueError(
                f"attention must be auto, triton, sdpa, flex, xformers or reference, got {name!r}"
            )
    if query_positions is None:
        return out
    return torch.where((query_positions >= 0)[:, :, None, None], out, 0)


def attend_packed(name: AttentionName, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`attend` of ``qkv [B, T, 3, H, d]``; the kernels' own gradient comes back packed."""
    match name:
        case "auto" | "triton" | "reference":
            return attention_packed(qkv, bias, impl=name)
        case _:
            q, k, v = qkv.unbind(2)
            return attend(name, q, k, v, bias)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    query_positions: Tensor | None,
    scale: float | None,
) -> Tensor:
    """PyTorch's ``scaled_dot_product_attention``, whichever of its kernels takes a bias."""
    mask = None if bias is None else _bias_BHQK(bias, query_positions, q)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    query_positions: Tensor | None,
    scale: float | None,
) -> Tensor:
    """PyTorch's FlexAttention: the bias, and which of its rows, are read by a score function."""
    rows = None if query_positions is None else query_positions.clamp(min=0).long()

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[h, i if rows is None else rows[b, i], j]

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    run = _flex_attention(compiled=q.is_cuda)
    return run(q, k, v, score_mod=None if bias is None else add_bias, scale=scale).transpose(1, 2)


def xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    query_positions: Tensor | None,
    scale: float | None,
) -> Tensor:
    """xformers' memory-efficient attention; it wants rows of the bias a multiple of 8 apart."""
    ops = importlib.import_module("xformers.ops")
    mask = None if bias is None else _bias_BHQK(bias, query_positions, q)
    return ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)


@functools.cache
def _flex_attention(*, compiled: bool) -> Callable[..., Tensor]:
    """Fused only when compiled; a CPU runs the plain form, and has no backward in either."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def _bias_BHQK(bias_HTK: Tensor, query_positions: Tensor | None, q: Tensor) -> Tensor:
    """The bias of every image's queries in q's dtype, its memory rows a multiple of 8 long.

    Without query_positions nothing is copied for each image. With, rows are picked as an embedding:
    its backward sums repeated rows in a fixed order on every device.
    """
    heads, rows, columns = bias_HTK.shape
    padded_HTK8 = F.pad(bias_HTK.to(q.dtype), (0, -columns % 8))
    if query_positions is None:
        return padded_HTK8[..., :columns].expand(q.shape[0], heads, rows, columns)
    flat = padded_HTK8.transpose(0, 1).flatten(1)
    picked = F.embedding(query_positions.clamp(min=0).long(), flat)
    return picked.unflatten(-1, (heads, -1)).transpose(1, 2)[..., :columns]
