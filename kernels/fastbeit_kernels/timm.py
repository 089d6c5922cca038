"""The kernels in timm's BEiT, ViT and EVA models: ``apply(model)``, ``restore(model)``.

Taken over, in that instance only: LayerNorm; attention (``Attention``, ``AttentionRope``, BEiT's
with its relative bias, EVA's), where query and key norms, gates and rotary embeddings stay timm's
code around the kernel; BEiT's shared relative bias; and blocks, whose residuals, LayerScale,
DropPath and second norm become two operations. DropPath draws what timm's would, from the same
generator. Written against timm 1.0.31.

Left to timm, and named in the report and a warning: attention with dropout, other attention and
block classes, norms that aren't LayerNorm, blocks whose parts carry hooks. ``torch.jit.script`` and
fx can't read modules that were taken over: ``restore`` first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from timm import layers
    from timm.layers import DropPath, LayerScale, apply_rot_embed_cat
    from timm.models import beit, eva, vision_transformer
except ImportError as error:
    raise ImportError(
        f"{__name__} adapts timm, which can't be imported ({error}); pip install timm"
    ) from error

from . import _adapt
from ._api.attention import attention, attention_packed, expand_rel_pos_bias
from ._dispatch import Impl

__all__ = ["apply", "restore"]

_LAYER_NORMS = (layers.LayerNorm, nn.LayerNorm)


def apply(model: nn.Module, *, impl: Impl = "auto") -> _adapt.Report:
    """Put the kernels into ``model``, in place: what was replaced, what wasn't, and why.

    A model that has them already is refused with ValueError (``restore`` it first, also to change
    ``impl``), as is one in which nothing can be replaced. A warning names what looks like
    attention, a norm or a block and was left. ``impl`` is that of the public functions: "auto"
    takes the kernels where a GPU has shown them right and faster. To be called before FSDP, DDP
    and ``torch.compile``.
    """
    return _adapt.take_over(model, impl, _TABLE, library="timm")


def restore(model: nn.Module) -> tuple[str, ...]:
    """Put timm's classes back, exactly; the names of the modules that had been replaced."""
    return _adapt.give_back(model, _TABLE)


class _Norm(_adapt.Taken):
    runs = "scale_residual_layer_norm"

    @staticmethod
    def unfit(module: Any, impl: Impl) -> str | None:
        return _adapt.layer_norm_unfit(module, _LAYER_NORMS)

    def forward(self, input: Tensor) -> Tensor:
        return _adapt.layer_norm(self, input, self.fastbeit_impl)


class FastLayerNorm(_Norm, layers.LayerNorm):
    untouched = layers.LayerNorm


class FastTorchLayerNorm(_Norm, nn.LayerNorm):
    untouched = nn.LayerNorm


def _dropout_unfit(module: Any) -> str | None:
    if module.attn_drop.p > 0:
        return f"attention dropout of {module.attn_drop.p}, which the kernels don't have"
    return None


def _scale(module: Any) -> float | None:
    """timm reads its own scale only where it doesn't call PyTorch's attention."""
    if module.training and module.attn_drop.p > 0:
        raise RuntimeError("attn_drop was set after apply, and the kernels have no dropout")
    return None if module.fused_attn else module.scale


def _qkv(module: Any, x: Tensor) -> Tensor:
    """The packed projection with the three biases that BEiT and EVA keep apart."""
    if getattr(module, "q_bias", None) is None:
        return module.qkv(x)
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    if module.qkv_bias_separate:
        return module.qkv(x) + bias
    return F.linear(x, module.qkv.weight, bias)


def _window_unfit(module: Any) -> str | None:
    """The kernels take from the window where each table row went; that must be what timm builds."""
    index = module.relative_position_index
    if index.device.type == "meta":
        return None
    if not torch.equal(index, beit.gen_relative_position_index(module.window_size, index.device)):
        return "its relative_position_index is not that of its window"
    return None


def _window_bias(module: Any) -> Tensor:
    """fp32 ``[H, T, T]``."""
    return expand_rel_pos_bias(
        module.relative_position_bias_table,
        module.relative_position_index,
        grid=module.window_size,
        impl=module.fastbeit_impl,
    )


class FastBeitAttention(_adapt.Taken, beit.Attention):
    untouched = beit.Attention
    runs = "attention_packed, expand_rel_pos_bias"

    @staticmethod
    def unfit(module: Any, impl: Impl) -> str | None:
        width = module.qkv.out_features // (3 * module.num_heads)
        window = _window_unfit(module) if module.window_size else None
        return window or _dropout_unfit(module) or _adapt.head_unfit(width, impl)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        scale, impl = _scale(self), self.fastbeit_impl
        qkv = _qkv(self, x).unflatten(-1, (3, self.num_heads, -1))
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = _window_bias(self)
            bias = own if bias is None else own + bias
        out = attention_packed(qkv, bias, scale=scale, impl=impl)
        return self.proj_drop(self.proj(out.flatten(2)))


class FastRelativePositionBias(_adapt.Taken, beit.RelativePositionBias):
    untouched = beit.RelativePositionBias
    runs = "expand_rel_pos_bias"

    @staticmethod
    def unfit(module: Any, impl: Impl) -> str | None:
        return _window_unfit(module)

    def forward(self) -> Tensor:
        # In the table's dtype, as timm has it, for attention that stays timm's.
        return _window_bias(self).to(self.relative_position_bias_table.dtype)


def _self_attention(
    self: Any, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """timm's self-attention but for BEiT's: ``[B, T, C]`` → ``[B, T, dim_out]``."""
    scale, impl = _scale(self), self.fastbeit_impl
    bias = _adapt.additive(attn_mask)
    if is_causal:
        if attn_mask is not None:
            raise ValueError("is_causal and attn_mask were both given; put one into the other")
        bias = x.new_full((x.shape[1], x.shape[1]), float("-inf"), dtype=torch.float32).triu(1)
    gate = self.gate(x).sigmoid() if self.gate is not None else None
    width = self.head_dim
    if self.qkv is None:
        q, k, v = (
            project(x).unflatten(-1, (-1, width)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        qkv = None
    else:
        qkv = _qkv(self, x).unflatten(-1, (3, self.num_heads, width))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    normed = not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity))
    if qkv is not None and rope is None and not normed:
        out = attention_packed(qkv, bias, scale=scale, impl=impl)
    else:
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (_rotated(self, each, rope).type_as(v) for each in (q, k))
        groups = getattr(self, "num_kv_groups", 1)
        if groups > 1:
            k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
        q, k, v = (each.transpose(1, 2).to(v.dtype) for each in (q, k, v))
        out = attention(q, k, v, bias, scale=scale, impl=impl)
    out = self.norm(out.flatten(2))
    if gate is not None:
        out = out * gate
    return self.proj_drop(self.proj(out))


def _rotated(self: Any, x_BHTd: Tensor, rope: Tensor) -> Tensor:
    prefix, patches = x_BHTd.tensor_split((self.num_prefix_tokens,), dim=2)
    turned = apply_rot_embed_cat(patches, rope, half=self.rotate_half)
    return torch.cat((prefix, turned), dim=2)


class _SelfAttention(_adapt.Taken):
    runs = "attention_packed, attention"

    @staticmethod
    def unfit(module: Any, impl: Impl) -> str | None:
        return _dropout_unfit(module) or _adapt.head_unfit(module.head_dim, impl)


class FastAttention(_SelfAttention, layers.Attention):
    untouched = layers.Attention

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return _self_attention(self, x, None, attn_mask, is_causal)


class _RotaryAttention(_SelfAttention):
    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return _self_attention(self, x, rope, attn_mask, is_causal)


class FastAttentionRope(_RotaryAttention, layers.AttentionRope):
    untouched = layers.AttentionRope


class FastEvaAttention(_RotaryAttention, eva.EvaAttention):
    untouched = eva.EvaAttention


def _drop_scale(drop: Any, branch: Tensor, gamma: Tensor | None) -> Tensor | None:
    """``[B]`` factors of timm's DropPath: its draw, of its shape and dtype."""
    if not isinstance(drop, DropPath) or drop.drop_prob == 0.0 or not drop.training:
        return None
    keep = 1 - drop.drop_prob
    dtype = _adapt.branch_dtype(branch, gamma)
    scale = branch.new_empty((branch.shape[0], 1, 1), dtype=dtype).bernoulli_(keep)
    if keep > 0.0 and drop.scale_by_keep:
        scale.div_(keep)
    return scale.flatten()


class _Block(_adapt.Taken):
    runs = "scale_residual_layer_norm, scale_residual"
    bypassed = ("norm2", "ls1", "ls2", "drop_path1", "drop_path2")

    @staticmethod
    def unfit(module: Any, impl: Impl) -> str | None:
        for name, kinds in (
            ("drop_path1", (DropPath, nn.Identity)),
            ("drop_path2", (DropPath, nn.Identity)),
            ("ls1", (LayerScale, nn.Identity)),
            ("ls2", (LayerScale, nn.Identity)),
        ):
            part = getattr(module, name, None)
            if part is not None and type(part) not in kinds:
                return f"its {name} is {type(part).__name__}, which isn't known here"
        return _adapt.layer_norm_unfit(module.norm2, _LAYER_NORMS)

    def run_block(
        self: Any, x: Tensor, gamma_1: Tensor | None, gamma_2: Tensor | None, **arguments: Any
    ) -> Tensor:
        self.check_unhooked()
        impl = self.fastbeit_impl
        branch = self.attn(self.norm1(x), **arguments)
        drop_scale = _drop_scale(self.drop_path1, branch, gamma_1)
        x, normed = _adapt.residual_norm(x, branch, gamma_1, drop_scale, self.norm2, impl)
        branch = self.mlp(normed)
        drop_scale = _drop_scale(self.drop_path2, branch, gamma_2)
        return _adapt.residual(x, branch, gamma_2, drop_scale, impl)


class FastBeitBlock(_Block, beit.Block):
    untouched = beit.Block

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self.run_block(
            x, self.gamma_1, self.gamma_2, shared_rel_pos_bias=shared_rel_pos_bias
        )


class FastBlock(_Block, vision_transformer.Block):
    untouched = vision_transformer.Block

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        gammas = (getattr(scale, "gamma", None) for scale in (self.ls1, self.ls2))
        return self.run_block(x, *gammas, attn_mask=attn_mask, is_causal=is_causal)


class FastEvaBlock(_Block, eva.EvaBlock):
    untouched = eva.EvaBlock

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        arguments = {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal}
        return self.run_block(x, self.gamma_1, self.gamma_2, **arguments)


_TABLE: tuple[type[_adapt.Taken], ...] = (
    FastLayerNorm,
    FastTorchLayerNorm,
    FastBeitAttention,
    FastRelativePositionBias,
    FastAttention,
    FastAttentionRope,
    FastEvaAttention,
    FastBeitBlock,
    FastBlock,
    FastEvaBlock,
)
