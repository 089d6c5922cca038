"""The kernels in Hugging Face's ViTs: ``register()`` for attention, ``apply(model)`` for more.

``register`` adds an implementation to transformers' attention interface, to be chosen by name with
``model.set_attn_implementation("fastbeit")`` or ``from_config(..., attn_implementation=...)``: for
BEiT, ViT and other encoders that use the interface. data2vec-vision doesn't, so there is ``apply``,
which takes modules over in one model: attention, LayerNorm, and the layers of BEiT, data2vec-vision
and ViT, whose residuals, LayerScale, DropPath and second norm become two operations. ``restore``
undoes it. DropPath draws what transformers' would, from the same generator. The relative bias is
transformers' own (it resizes the table on every call) and reaches the kernels as a bias, whose
gradient they give. LayerNorm keeps the model's epsilon. Written against transformers 5.23.

Refused, because the kernels don't have it: dropout of attention probabilities, returned attention
probabilities, causal or grouped-query attention, softcap and the like.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.beit import modeling_beit as beit
    from transformers.models.data2vec import modeling_data2vec_vision as data2vec
    from transformers.models.vit import modeling_vit as vit
except ImportError as error:
    raise ImportError(
        f"{__name__} adapts transformers 5.20 or newer, which can't be imported ({error}); "
        "pip install 'transformers>=5.20'"
    ) from error

from . import _adapt
from ._api.attention import attention
from ._checks import check_impl_name
from ._dispatch import Impl

__all__ = ["apply", "register", "restore"]

# What callers may hand to an attention function that changes its result.
_UNKNOWN = "output_attentions head_mask softcap s_aux position_bias sliding_window cache".split()


def register(name: str = "fastbeit", impl: Impl = "auto") -> None:
    """Make ``name`` an attention implementation of transformers, in this process.

    Registering a name again changes its ``impl``; a name that is somebody else's is refused with
    ValueError. A padding mask reaches the kernels as a bias, as transformers' eager attention has
    it.
    """
    check_impl_name("register", impl)
    known = ALL_ATTENTION_FUNCTIONS.get(name)
    ours = isinstance(known, functools.partial) and known.func is attention_forward
    if name == "eager" or (known is not None and not ours):
        raise ValueError(f"register: {name!r} is another attention of transformers; choose a name")
    AttentionInterface.register(name, functools.partial(attention_forward, impl=impl))
    AttentionMaskInterface.register(name, eager_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    *,
    impl: Impl = "auto",
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query, key, value ``[B, H, T, d]`` → ``[B, T, H, d]``, no weights.

    ``attention_mask``: None, a bias or a boolean mask (True: look here), broadcastable to
    ``[B, H, Tq, Tk]``. ``scaling`` None is ``d ** -0.5``.
    """
    _refuse(module, dropout, arguments)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if is_causal and attention_mask is None and query.shape[2] > 1:
        raise ValueError(
            f"{type(module).__name__} wants causal attention, which these kernels don't have; they "
            "are for encoders (a causal mask may be given as attention_mask)"
        )
    if key.shape[1] != query.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}; the kernels have no "
            "grouped-query attention: repeat the heads of key and value"
        )
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    return attention(q, k, v, _adapt.additive(attention_mask), scale=scaling, impl=impl), None


def _refuse(module: nn.Module, dropout: float, arguments: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(
            f"{type(module).__name__} wants attention dropout of {dropout}, which the kernels "
            "don't have; set attention_probs_dropout_prob to 0 in its config"
        )
    config = getattr(module, "config", None)
    arguments.setdefault("output_attentions", getattr(config, "output_attentions", False))
    for name in _UNKNOWN:
        if arguments.get(name) is not None and arguments[name] is not False:
            raise ValueError(
                f"{type(module).__name__} was called with {name}, which the kernels don't have; "
                "transformers' own eager attention has it"
            )


def apply(model: nn.Module, *, impl: Impl = "auto") -> _adapt.Report:
    """Put the kernels into ``model``, in place: what was replaced, what wasn't, and why.

    A model that has them already is refused with ValueError (``restore`` it first, also to change
    ``impl``), as is one in which nothing can be replaced. A warning names what looks like
    attention, a norm or a layer and was left. ``impl`` is that of the public functions: "auto"
    takes the kernels where a GPU has shown them right and faster. To be called before FSDP, DDP
    and ``torch.compile``. The attention implementation in the model's config goes on saying what
    its masks look like.
    """
    wrappers = (data2vec.Data2VecVisionAttention,)
    return _adapt.take_over(model, impl, _TABLE, library="transformers", no_work=wrappers)


def restore(model: nn.Module) -> tuple[str, ...]:
    """Put transformers' classes back, exactly; the names of the modules that were replaced."""
    return _adapt.give_back(model, _TABLE)


class FastLayerNorm(_adapt.Taken, nn.LayerNorm):
    untouched = nn.LayerNorm
    runs = "scale_residual_layer_norm"

    @staticmethod
    def unfit(module: Any, impl: Impl) -> str | None:
        return _adapt.layer_norm_unfit(module, (nn.LayerNorm,))

    def forward(self, input: Tensor) -> Tensor:
        return _adapt.layer_norm(self, input, self.fastbeit_impl)


class _Attention(_adapt.Taken):
    """BEiT's and ViT's, which are the same."""

    runs = "attention"

    @staticmethod
    def unfit(module: Any, impl: Impl) -> str | None:
        if module.attention_dropout > 0:
            return f"attention dropout of {module.attention_dropout}, which the kernels don't have"
        return _adapt.head_unfit(module.head_dim, impl)

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.attention_dropout if self.training else 0.0
        kwargs |= {"scaling": self.scaling, "dropout": dropout, "impl": self.fastbeit_impl}
        out, _ = attention_forward(self, q, k, v, attention_mask, **kwargs)
        return self.o_proj(out.flatten(2)), None


class FastBeitAttention(_Attention, beit.BeitAttention):
    untouched = beit.BeitAttention


class FastViTAttention(_Attention, vit.ViTAttention):
    untouched = vit.ViTAttention


def _window(resolution: Any, patch: Any) -> tuple[int, int]:
    return resolution[0] // patch, resolution[1] // patch


class _Data2VecAttention(_adapt.Taken):
    runs = "attention"

    @staticmethod
    def unfit(module: Any, impl: Impl) -> str | None:
        if module.dropout.p > 0 or module.config.attention_probs_dropout_prob > 0:
            return f"attention dropout of {module.dropout.p}, which the kernels don't have"
        return _adapt.head_unfit(module.attention_head_size, impl)

    def forward(
        self: Any,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> tuple[Tensor, ...]:
        dropout = self.dropout.p if self.training else 0.0
        _refuse(self, dropout, {"output_attentions": output_attentions})
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.attention_head_size))
            for project in (self.query, self.key, self.value)
        )
        bias = relative_position_bias
        if self.has_relative_position_bias:
            window = _window(resolution, self.config.patch_size)
            own = self.relative_position_bias(
                window, interpolate_pos_encoding, dim_size=hidden_states.shape[1]
            )
            bias = own if bias is None else own + bias
        return (attention(q, k, v, bias, impl=self.fastbeit_impl).flatten(2),)


class FastData2VecAttention(_Data2VecAttention, data2vec.Data2VecVisionSelfAttention):
    untouched = data2vec.Data2VecVisionSelfAttention


class FastData2VecSdpaAttention(_Data2VecAttention, data2vec.Data2VecVisionSdpaSelfAttention):
    untouched = data2vec.Data2VecVisionSdpaSelfAttention


def _drop_scale(drop: Any, branch: Tensor, gamma: Tensor | None) -> Tensor | None:
    """``[B]`` factors of transformers' DropPath: its draw, of its shape and dtype."""
    if isinstance(drop, nn.Identity) or drop.drop_prob == 0.0 or not drop.training:
        return None
    keep = 1 - drop.drop_prob
    shape, dtype = (branch.shape[0], 1, 1), _adapt.branch_dtype(branch, gamma)
    kept = torch.floor(torch.rand(shape, dtype=dtype, device=branch.device) + keep)
    return kept.flatten().div(keep)


class _Layer(_adapt.Taken):
    runs = "scale_residual_layer_norm, scale_residual"
    bypassed = ("layernorm_after", "drop_path")

    @staticmethod
    def unfit(module: Any, impl: Impl) -> str | None:
        drop = getattr(module, "drop_path", None)
        known = (beit.BeitDropPath, data2vec.Data2VecVisionDropPath, nn.Identity, type(None))
        if type(drop) not in known:
            return f"its drop_path is {type(drop).__name__}, which isn't known here"
        return _adapt.layer_norm_unfit(module.layernorm_after, (nn.LayerNorm,))

    def run_layer(self: Any, x: Tensor, attend: Any, mlp: Any) -> Tensor:
        """``attend`` and ``mlp`` of normed tokens, each with what may stand behind it."""
        self.check_unhooked()
        impl, drop = self.fastbeit_impl, getattr(self, "drop_path", nn.Identity())
        gammas = (getattr(self, name, None) for name in ("lambda_1", "lambda_2"))
        gamma_1, gamma_2 = (each if isinstance(each, Tensor) else None for each in gammas)
        branch = attend(self.layernorm_before(x))
        drop_scale = _drop_scale(drop, branch, gamma_1)
        norm = self.layernorm_after
        x, normed = _adapt.residual_norm(x, branch, gamma_1, drop_scale, norm, impl)
        branch = mlp(normed)
        drop_scale = _drop_scale(drop, branch, gamma_2)
        return _adapt.residual(x, branch, gamma_2, drop_scale, impl)


class FastBeitLayer(_Layer, beit.BeitLayer):
    untouched = beit.BeitLayer

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        mask = attention_mask
        if self.relative_position_bias is not None:
            window = _window(resolution, self.patch_size)
            bias = self.relative_position_bias(
                window, interpolate_pos_encoding, dim_size=hidden_states.shape[1]
            )
            mask = bias if mask is None else bias + mask
        return self.run_layer(
            hidden_states,
            lambda x: self.dropout(self.attention(x, attention_mask=mask, **kwargs)[0]),
            lambda x: self.dropout(self.mlp(x)),
        )


class FastViTLayer(_Layer, vit.ViTLayer):
    untouched = vit.ViTLayer

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        return self.run_layer(
            hidden_states,
            lambda x: self.dropout(self.attention(x, attention_mask, **kwargs)[0]),
            lambda x: self.dropout(self.mlp(x)),
        )


class FastData2VecLayer(_Layer, data2vec.Data2VecVisionLayer):
    untouched = data2vec.Data2VecVisionLayer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (
            self.run_layer(
                hidden_states,
                lambda x: self.attention(x, *args, **kwargs)[0],
                lambda x: self.output(self.intermediate(x)),
            ),
        )


_TABLE: tuple[type[_adapt.Taken], ...] = (
    FastLayerNorm,
    FastBeitAttention,
    FastViTAttention,
    FastData2VecAttention,
    FastData2VecSdpaAttention,
    FastBeitLayer,
    FastViTLayer,
    FastData2VecLayer,
)
