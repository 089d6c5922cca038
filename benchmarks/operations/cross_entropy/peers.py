"""Who computes the head's loss: ours, PyTorch, and libraries for language models' losses.

Those begin at selected rows, so PyTorch gathers before them. None but ours and the reference counts
right answers too; what they do otherwise is the same work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import fastbeit_kernels
from benchmarks.call import Call, Function, Outputs
from benchmarks.operation import OURS, Peer
from benchmarks.operations.cross_entropy.shapes import Head
from benchmarks.peers import Unavailable, compiled, imported, plainly

EMPTY = -1
# (rows [R, D], weight, bias, targets [R]) -> loss
Loss = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def ours(impl: Any) -> Function:
    """The public function of fastbeit_kernels."""

    def function(call: Call) -> Outputs:
        found = fastbeit_kernels.masked_linear_cross_entropy(
            call.leaves["hidden"],
            call.given.get("positions"),
            call.leaves["weight"],
            call.leaves.get("bias"),
            call.given["targets"],
            label_smoothing=call.shape.smoothing,
            impl=impl,
        )
        return found._asdict()

    return function


def gathered(call: Call) -> tuple[Tensor, Tensor]:
    """Rows ``[R, D]`` and targets ``[R]``, of empty slots -1."""
    hidden, positions = call.leaves["hidden"], call.given.get("positions")
    targets = call.given["targets"]
    if positions is not None:
        index = positions.clamp(min=0).long()[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, index)
        targets = targets.masked_fill(positions < 0, EMPTY)
    return hidden.flatten(0, 1), targets.flatten()


def with_loss(loss: Loss) -> Function:
    def function(call: Call) -> Outputs:
        rows, targets = gathered(call)
        return {"loss": loss(rows, call.leaves["weight"], call.leaves.get("bias"), targets)}

    return function


def torch_loss(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Logits in the inputs' precision, cross-entropy in fp32."""
    return F.cross_entropy(F.linear(rows, weight, bias).float(), targets, ignore_index=EMPTY)


def liger(fused: bool) -> Callable[[Head], Function]:
    """Its fused form reads the number of filled slots on the host, which waits for the device."""

    def form(_shape: Head) -> Function:
        library = imported("liger_kernel.transformers.functional")

        def loss(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
            if not fused:
                logits = F.linear(rows, weight, bias)
                return library.liger_cross_entropy(logits, targets, ignore_index=EMPTY)
            return library.liger_fused_linear_cross_entropy(
                rows, weight, targets, bias=bias, ignore_index=EMPTY
            )

        return with_loss(loss)

    return form


def cut(impl: str) -> Callable[[Head], Function]:
    """Apple's Cut Cross-Entropy, which never writes the logits."""

    def form(_shape: Head) -> Function:
        library = imported("cut_cross_entropy")

        def loss(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
            return library.linear_cross_entropy(
                rows, weight, targets, bias=bias, ignore_index=EMPTY, impl=impl
            )

        return with_loss(loss)

    return form


def quack(chunked: bool) -> Callable[[Head], Function]:
    def form(_shape: Head) -> Function:
        library = imported("quack.linear_cross_entropy")
        name = "chunked_linear_cross_entropy" if chunked else "linear_cross_entropy_func"
        function = getattr(library, name, None)
        if function is None:
            raise Unavailable(f"this quack has no {name}")

        def loss(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
            if chunked:
                return function(rows, weight, targets, ignore_index=EMPTY)
            return function(rows, weight, bias, targets, ignore_index=EMPTY)

        return with_loss(loss)

    return form


_EAGER = plainly(with_loss(torch_loss))
PEERS = (
    Peer(OURS, plainly(ours("triton")), ours=True),
    Peer("eager PyTorch", _EAGER),
    Peer("PyTorch, right answers counted (reference)", plainly(ours("reference"))),
    Peer("Liger fused linear cross-entropy", liger(fused=True)),
    Peer("Liger cross-entropy behind linear", liger(fused=False)),
    Peer("Apple CCE, exact", cut("cce_exact")),
    Peer("Apple CCE, filtered", cut("cce"), less="small gradients left out"),
    Peer("quack cross-entropy behind linear", quack(chunked=False)),
    Peer(
        "quack chunked linear cross-entropy",
        quack(chunked=True),
        less="no bias",
        without=("bias",),
    ),
    Peer("torch.compile max-autotune", compiled(_EAGER), slow=True),
)
