"""A BEiT block: pre-norm attention with a trained bias, MLP, LayerScale and DropPath.

Shapes: B batch, T tokens, M mask slots, D width, H heads, d head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbeit.model.attention_backends import attend, attend_packed
from fastbeit.model.backends import AUTO, Backends
from fastbeit.model.config import BeitConfig
from fastbeit.model.positions import relative_index, relative_rows
from fastbeit_kernels import (
    Impl,
    bias_gelu,
    choose,
    expand_rel_pos_bias,
    scale_residual,
    scale_residual_layer_norm,
)


class _KeyThirdFrozen(torch.autograd.Function):
    """The packed bias as it is; in its gradient the key third is zero."""

    @staticmethod
    def forward(ctx: Any, bias_3D: Tensor) -> Tensor:
        return bias_3D.view_as(bias_3D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad_3D,) = grads
        width = grad_3D.shape[0] // 3
        grad_3D = grad_3D.clone()
        grad_3D[width : 2 * width] = 0
        return grad_3D


class PackedQkv(nn.Linear):
    """Queries, keys and values in one product. Only queries and values have a trained bias.

    ``bias`` is one ``[3D]`` parameter whose middle third starts at zero and takes no gradient, so
    nothing is concatenated in a step; files hold it as ``q_bias`` and ``v_bias``. (A key bias adds
    the same to all scores of a query and changes no softmax, so its gradient is rounding noise,
    which AdamW would blow up to full steps.)
    """

    def packed_bias(self) -> Tensor:
        return _KeyThirdFrozen.apply(self.bias)  # pyright: ignore[reportReturnType]

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.packed_bias())


def gather_rows(x_BTD: Tensor, rows_BM: Tensor) -> Tensor:
    """Rows ``rows_BM`` of each image, ``[B, M, D]``; -1 takes row 0, for its reader to ignore."""
    index = rows_BM.clamp(min=0).long()[..., None].expand(-1, -1, x_BTD.shape[-1])
    return x_BTD.gather(1, index)


class Pending(NamedTuple):
    """A branch that the residual stream has yet to take in: the next norm adds it, in one pass.

    branch_BTD ``[B, T, D]``; gamma_D ``[D]`` LayerScale and drop_scale_B ``[B]`` DropPath, or None.
    """

    branch_BTD: Tensor
    gamma_D: Tensor | None
    drop_scale_B: Tensor | None


def add(x_BTD: Tensor, pending: Pending | None, impl: Impl) -> Tensor:
    """The residual stream with what it still lacks."""
    if pending is None:
        return x_BTD
    branch, gamma, drop_scale = pending
    return scale_residual(x_BTD, branch, gamma=gamma, drop_scale=drop_scale, impl=impl)


def add_and_norm(
    norm: nn.LayerNorm, x_BTD: Tensor, pending: Pending | None, impl: Impl
) -> tuple[Tensor, Tensor]:
    """:func:`add`, and the LayerNorm of the sum."""
    branch, gamma, drop_scale = (None, None, None) if pending is None else pending
    return scale_residual_layer_norm(
        x_BTD,
        branch,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
        gamma=gamma,
        drop_scale=drop_scale,
        impl=impl,
    )


class Attention(nn.Module):
    relative_position_index: Tensor

    def __init__(self, config: BeitConfig, backends: Backends = AUTO) -> None:
        super().__init__()
        self.backends = backends
        width = config.width
        self.heads = config.heads
        self.grid = config.grid
        self.qkv = PackedQkv(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if config.position == "relative_per_block":
            self.relative_position_bias_table = nn.Parameter(
                torch.zeros(relative_rows(config.grid), config.heads)
            )
            self.register_buffer(
                "relative_position_index", relative_index(config.grid), persistent=False
            )
        else:
            self.relative_position_bias_table = None

    def forward(
        self, x_BTD: Tensor, bias_HTT: Tensor | None, rows_BM: Tensor | None = None
    ) -> Tensor:
        name = self.backends.attention_name
        if self.relative_position_bias_table is not None:
            bias_HTT = expand_rel_pos_bias(
                self.relative_position_bias_table,
                self.relative_position_index,
                grid=self.grid,
                impl=self.backends.kernels,
            )
        if rows_BM is None:
            qkv_BT3Hd = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1))
            return self.proj(attend_packed(name, qkv_BT3Hd, bias_HTT).flatten(2))
        width = x_BTD.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.packed_bias()
        q = F.linear(gather_rows(x_BTD, rows_BM), weight[:width], bias[:width])
        kv = F.linear(x_BTD, weight[width:], bias[width:]).unflatten(-1, (2, self.heads, -1))
        q_BMHd = q.unflatten(-1, (self.heads, -1))
        k_BTHd, v_BTHd = kv.unbind(2)
        out = attend(name, q_BMHd, k_BTHd, v_BTHd, bias_HTT, query_positions=rows_BM)
        return self.proj(out.flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: BeitConfig, backends: Backends = AUTO) -> None:
        super().__init__()
        self.backends = backends
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        impl = self.backends.kernels
        if choose("bias_gelu", impl, x_BTD) == "reference":
            # A library's product adds its bias on the way: apart, it would be one pass more.
            return self.fc2(F.gelu(self.fc1(x_BTD)))
        hidden = F.linear(x_BTD, self.fc1.weight)
        return self.fc2(bias_gelu(hidden, self.fc1.bias, impl=impl))


class Block(nn.Module):
    """``x + DropPath(gamma_1 * attention(norm1(x)))``, then the same with the MLP."""

    def __init__(self, config: BeitConfig, backends: Backends = AUTO) -> None:
        super().__init__()
        self.backends = backends
        self.checkpointing = False
        """Keep only what the block is given, and compute it again in the backward pass. Exact."""
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config, backends)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config, backends)
        scaled = config.layer_scale is not None
        self.gamma_1 = nn.Parameter(torch.empty(config.width)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.empty(config.width)) if scaled else None

    def forward(
        self,
        x_BTD: Tensor,
        bias_HTT: Tensor | None = None,
        drop_scale_B2: Tensor | None = None,
        rows_BM: Tensor | None = None,
        *,
        pending: Pending | None = None,
        defer: bool = False,
    ) -> Tensor | tuple[Tensor, Pending]:
        """One block.

        Args:
            x_BTD: ``[B, T, D]``.
            bias_HTT: fp32 ``[H, T, T]`` of a shared relative table, or None.
            drop_scale_B2: ``[B, 2]`` DropPath factors of attention and MLP, or None.
            rows_BM: ``[B, M]`` tokens asked for, -1 in empty slots. Keys and values still cover all
                tokens; queries, attention rows, projection and MLP only these.
            pending: what the block before left to add to x_BTD.
            defer: leave the MLP's branch to the next norm in the same way. Exact.

        Returns:
            ``[B, T, D]``; with rows_BM ``[B, M, D]``, where rows of empty slots mean nothing. With
            defer the stream before the MLP's branch, and the branch.
        """
        arguments = (x_BTD, bias_HTT, drop_scale_B2, rows_BM, pending, defer)
        if self.checkpointing and torch.is_grad_enabled():
            # Nothing in a block draws at random: DropPath's factors are given.
            return checkpoint(
                self._compute, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        return self._compute(*arguments)

    def _compute(
        self,
        x_BTD: Tensor,
        bias_HTT: Tensor | None,
        drop_scale_B2: Tensor | None,
        rows_BM: Tensor | None,
        pending: Pending | None,
        defer: bool,
    ) -> Tensor | tuple[Tensor, Pending]:
        impl = self.backends.kernels
        drop_attn, drop_mlp = (None, None) if drop_scale_B2 is None else drop_scale_B2.unbind(1)
        x, normed = add_and_norm(self.norm1, x_BTD, pending, impl)
        attended = self.attn(normed, bias_HTT, rows_BM)
        if rows_BM is not None:
            x = gather_rows(x, rows_BM)
        x, normed = add_and_norm(self.norm2, x, Pending(attended, self.gamma_1, drop_attn), impl)
        branch, gamma = self.mlp(normed), self.gamma_2
        if not defer:
            return add(x, Pending(branch, gamma, drop_mlp), impl)
        # Sharding frees a unit's parameters before the next unit runs: gamma leaves as a copy. And
        # it warns of views; a linear layer's output is one of [B * T, D] that nobody else holds.
        branch = torch.ops.aten._unsafe_view(branch, branch.shape)
        return x, Pending(branch, None if gamma is None else gamma.clone(), drop_mlp)
