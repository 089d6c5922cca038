"""Everyone who is timed: ours, and each peer that computes attention with an additive bias.

``bias=False`` marks yardsticks, which do less work. Who takes a bias but refuses its gradient is
found out by trying.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.nn.attention import SDPBackend

from benchmarks import forms
from benchmarks.forms import Form
from benchmarks.problems import Problem


@dataclass(frozen=True)
class Peer:
    """``form(problem)`` builds the function to time. ``slow``: it compiles for many seconds."""

    name: str
    form: Callable[[Problem], Form]
    bias: bool = True
    slow: bool = False
    ours: bool = False
    operations: tuple[str, ...] = ("attention",)


ATTEND = ("attention", "rel_pos_attention")
OURS = "fastbeit_kernels"
FLASH2 = "SDPA flash (FlashAttention-2), no bias"
PEERS = (
    Peer(OURS, forms.ours("triton"), ours=True, operations=(*ATTEND, "expand")),
    Peer(
        FLASH2, forms.from_core(forms.sdpa_core(SDPBackend.FLASH_ATTENTION), bias=False), bias=False
    ),
    Peer(
        "SDPA memory-efficient",
        forms.from_core(forms.sdpa_core(SDPBackend.EFFICIENT_ATTENTION)),
        operations=ATTEND,
    ),
    Peer(
        "SDPA cuDNN",
        forms.from_core(forms.sdpa_core(SDPBackend.CUDNN_ATTENTION)),
        operations=ATTEND,
    ),
    Peer("SDPA math", forms.from_core(forms.sdpa_core(SDPBackend.MATH))),
    Peer("eager PyTorch", forms.from_core(forms.eager_core), operations=ATTEND),
    Peer(
        "SDPA, PyTorch's choice (reference)",
        forms.ours("reference"),
        operations=("attention", "expand"),
    ),
    Peer("embedding", forms.expand_with(forms.expanded), operations=("expand",)),
    Peer("indexing", forms.expand_with(forms.indexed), operations=("expand",)),
    Peer("xformers", forms.xformers),
    Peer("Transformer Engine cuDNN", forms.transformer_engine),
    Peer("flash_attn, no bias", forms.flash_package("flash_attn"), bias=False),
    Peer("flash_attn 3, no bias", forms.flash_package("flash_attn_interface"), bias=False),
    Peer("FlexAttention, captured bias", forms.flex, slow=True, operations=ATTEND),
    Peer(
        "torch.compile max-autotune",
        forms.compiled(forms.from_core(forms.eager_core)),
        slow=True,
        operations=ATTEND,
    ),
    Peer(
        "torch.compile of embedding",
        forms.compiled(forms.expand_with(forms.expanded)),
        slow=True,
        operations=("expand",),
    ),
)


def peers_for(problem: Problem) -> tuple[Peer, ...]:
    return tuple(peer for peer in PEERS if problem.operation in peer.operations)
