"""Everyone who is timed: ours, and each peer that computes attention with an additive bias.

Who takes a bias but refuses its gradient is found out by trying.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.nn.attention import SDPBackend

from benchmarks.operation import OURS, Peer
from benchmarks.operations.attention import forms
from benchmarks.operations.attention.cases import FLASH2
from benchmarks.operations.attention.shapes import Attention
from benchmarks.peers import compiled, plainly

NO_BIAS = "no bias"
BIASES = ("bias", "table")


def from_bias(shape: Attention) -> bool:
    return shape.kind in ("attention", "packed")


def attends(shape: Attention) -> bool:
    return not shape.expands


def expands(shape: Attention) -> bool:
    return shape.expands


def either(shape: Attention) -> bool:
    return from_bias(shape) or expands(shape)


def with_bias(
    name: str, form: forms.Form, fits: Callable[[Attention], bool] = attends, slow: bool = False
) -> Peer:
    return Peer(name, form, slow=slow, fits=fits)


def blind(name: str, form: forms.Form) -> Peer:
    """A yardstick that takes no bias."""
    return Peer(name, form, less=NO_BIAS, without=BIASES, fits=from_bias)


def sdpa(backend: SDPBackend, bias: bool = True) -> forms.Form:
    return forms.from_core(forms.sdpa_core(backend), bias)


_EAGER = forms.from_core(forms.eager_core)
PEERS = (
    Peer(OURS, plainly(forms.ours("triton")), ours=True),
    blind(FLASH2, sdpa(SDPBackend.FLASH_ATTENTION, bias=False)),
    with_bias("SDPA memory-efficient", sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    with_bias("SDPA cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION)),
    with_bias("SDPA math", sdpa(SDPBackend.MATH), from_bias),
    with_bias("eager PyTorch", _EAGER),
    with_bias("SDPA, PyTorch's choice (reference)", plainly(forms.ours("reference")), either),
    with_bias("embedding", forms.expand_with(forms.expanded), expands),
    with_bias("indexing", forms.expand_with(forms.indexed), expands),
    with_bias("xformers", forms.xformers, from_bias),
    with_bias("Transformer Engine cuDNN", forms.transformer_engine, from_bias),
    blind("flash_attn, no bias", forms.flash_package("flash_attn")),
    blind("flash_attn 3, no bias", forms.flash_package("flash_attn_interface")),
    with_bias("FlexAttention, captured bias", forms.flex, slow=True),
    with_bias("torch.compile max-autotune", compiled(_EAGER), slow=True),
    with_bias(
        "torch.compile of embedding",
        compiled(forms.expand_with(forms.expanded)),
        expands,
        slow=True,
    ),
)
