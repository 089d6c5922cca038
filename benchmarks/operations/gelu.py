"""bias_gelu: everything about it.

Shapes: B images, T tokens, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastbeit_kernels
from benchmarks.call import Call, Function, Outputs
from benchmarks.judge import judge_in_own_precision
from benchmarks.operation import OURS, Case, Operation, Pass, Peer, Problem
from benchmarks.peers import compiled, plainly
from benchmarks.roofline import Work
from benchmarks.targets import Target

# Where erf's polynomial ends, and where 16-bit results have almost no digit left.
TAIL = (-12.0, 12.0)


@dataclass(frozen=True)
class Activations:
    """``bias_dtype``: None for that of x. ``tail``: x evenly over a range instead of normal."""

    batch: int
    tokens: int
    columns: int
    bias: bool = True
    bias_dtype: str | None = None
    tail: bool = False

    def describe(self) -> str:
        return f"{self.batch}×{self.tokens}×{self.columns}" + ("" if self.bias else ", no bias")

    def shrunk(self) -> Activations:
        columns = min(self.columns, 40 + self.columns % 5)
        return replace(self, batch=min(self.batch, 2), tokens=min(self.tokens, 7), columns=columns)

    def work(self, direction: Pass, dtype: torch.dtype) -> Work:
        """Forward x read, y written; backward x and dy read, dx written; the bias beside them."""
        if direction == "both":
            return self.work("forward", dtype) + self.work("backward", dtype)
        tensors = 3 if direction == "backward" else 2
        elements = tensors * self.batch * self.tokens * self.columns
        vectors = self.bias * self.columns * (2 if direction == "backward" else 1)
        return Work(0, (elements + vectors) * dtype.itemsize)

    def make(self, dtype: torch.dtype, seed: int, device: torch.device) -> Call:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        shape = (self.batch, self.tokens, self.columns)
        x = normal(*shape)
        if self.tail:
            even = torch.linspace(*TAIL, x.numel(), device=device)
            order = torch.rand(x.numel(), generator=generator, device=device).argsort()
            x = even[order].view(shape)
        leaves = {"x": x.to(dtype)}
        if self.bias:
            own = dtype if self.bias_dtype is None else getattr(torch, self.bias_dtype)
            leaves["bias"] = normal(self.columns).mul(0.1).to(own)
        return Call(self, leaves, {}, {"out": normal(*shape).to(dtype)}, frozenset({"x", "out"}))


def ours(impl: Any) -> Function:
    """The public function of fastbeit_kernels."""

    def function(call: Call) -> Outputs:
        leaves = call.leaves
        return {"out": fastbeit_kernels.bias_gelu(leaves["x"], leaves.get("bias"), impl=impl)}

    return function


def by_definition(call: Call) -> Outputs:
    """z Φ(z), z = x + bias, with Φ by the complementary error function: 1 + erf(z) has lost all
    digits where z is far below zero. 16 bits are widened and rounded once, as PyTorch's GELU."""
    x = call.leaves["x"]
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide)
    if "bias" in call.leaves:
        z = z + call.leaves["bias"].to(wide)
    return {"out": (z * 0.5 * torch.erfc(-z * 0.5**0.5)).to(x.dtype)}


def eager(call: Call) -> Outputs:
    """The bias added and GELU taken as two calls."""
    x = call.leaves["x"]
    z = x + call.leaves["bias"] if "bias" in call.leaves else x
    return {"out": F.gelu(z).to(x.dtype)}


PEERS = (
    Peer(OURS, plainly(ours("triton")), ours=True),
    Peer("eager PyTorch", plainly(eager)),
    Peer("torch.compile max-autotune", compiled(plainly(eager)), slow=True),
)

_BEIT = Activations(3, 197, 3072)
# In order of worth.
CASES = (
    Case("GELU of BEiT-B", "an MLP's hidden layer", _BEIT, machinery=True),
    Case(
        "GELU of BEiT-B at full size",
        "every partial sum of dbias",
        Activations(128, 197, 3072),
        ("bfloat16",),
        1,
    ),
    Case("GELU without bias", "in the product before it", replace(_BEIT, bias=False)),
    Case("GELU, fp32 bias", "beside 16-bit rows", replace(_BEIT, bias_dtype="float32")),
    Case("GELU, tails", "-12 to 12: erf's two polynomials", Activations(1, 97, 1024, tail=True)),
    Case("GELU, odd columns", "rows of 777", Activations(2, 13, 777), sanitized=True),
    Case("GELU of one row", "nothing to sum over", Activations(1, 1, 3072)),
)

_B = Activations(128, 197, 3072)
# In order of worth.
PROBLEMS = (
    Problem("BEiT-B, bias + GELU", _B, worth=0),
    Problem("BEiT-L, bias + GELU", Activations(64, 197, 4096), worth=2),
)

# "Ahead of every peer" is all that is wanted of it.
TARGETS: tuple[Target, ...] = ()

OPERATION = Operation(
    name="bias and GELU",
    about="the exact GELU of a product and its bias, with the bias's gradient",
    ours=ours,
    definition=by_definition,
    cases=CASES,
    problems=PROBLEMS,
    peers=PEERS,
    targets=TARGETS,
    share=0.06,
    judge=judge_in_own_precision,
)
