"""Residual + LayerScale + DropPath + LayerNorm: sizes, random inputs, least work, the formulas.

Shapes: B images, T tokens, D width. y = x + drop·γ·branch; normed = (y - mean)/σ · weight + bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.call import Call, Outputs
from benchmarks.operation import Pass
from benchmarks.roofline import FLOAT_BYTES, Work

EPS = 1e-6


@dataclass(frozen=True)
class Norm:
    """Without ``branch``, LayerNorm alone (and no γ, no drop); without ``norm``, the sum alone.

    ``stream``: dtype of x and of the parameters, where it isn't that of the branch. ``mean``: of x.
    """

    batch: int
    tokens: int
    width: int
    branch: bool = True
    gamma: bool = True
    drop: bool = True
    bias: bool = True
    norm: bool = True
    stream: str | None = None
    mean: float = 0.0

    def describe(self) -> str:
        return f"{self.batch}×{self.tokens}×{self.width}"

    def shrunk(self) -> Norm:
        width = min(self.width, 24 - self.width % 2)
        return replace(self, batch=min(self.batch, 2), tokens=min(self.tokens, 5), width=width)

    def work(self, direction: Pass, dtype: torch.dtype) -> Work:
        """Forward: x and the branch read, y and normed written. Backward: the gradients of both, y
        and (for dγ) the branch read, dx and dbranch written; without a branch y is x and has no
        gradient of its own, without a norm dx is dy. Mean and 1/σ of each row, and the parameters
        with their gradients, once."""
        if direction == "both":
            return self.work("forward", dtype) + self.work("backward", dtype)
        scaled = self.branch and self.gamma
        if direction == "backward":
            read = self.branch + 2 * self.norm + scaled
            written = self.branch + self.norm
        else:
            read = 1 + self.branch
            written = self.branch + self.norm
        rows = self.batch * self.tokens
        vectors = scaled + self.norm * (1 + self.bias)
        elements = ((read + written) * rows + vectors) * self.width
        return Work(0, elements * dtype.itemsize + self.norm * 2 * rows * FLOAT_BYTES)

    def make(self, dtype: torch.dtype, seed: int, device: torch.device) -> Call:
        """DropPath's factors are fp32; of several images the first is dropped, the last isn't."""
        generator = torch.Generator(device).manual_seed(seed)
        wide = dtype if self.stream is None else getattr(torch, self.stream)

        def normal(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        sizes = (self.batch, self.tokens, self.width)
        leaves = {"x": (normal(*sizes, dtype=torch.float32) + self.mean).to(wide)}
        given: dict[str, Tensor] = {}
        if self.branch:
            leaves["branch"] = normal(*sizes, dtype=dtype)
            if self.gamma:
                leaves["gamma"] = normal(self.width)
            if self.drop:
                kept = torch.rand(self.batch, generator=generator, device=device) >= 0.2
                kept[0], kept[-1] = False, True
                given["drop_scale"] = kept / 0.8
        if self.norm:
            leaves["weight"] = 1 + 0.5 * normal(self.width)
            if self.bias:
                leaves["bias"] = normal(self.width)
        outputs = [name for name, there in (("y", self.branch), ("normed", self.norm)) if there]
        batched = frozenset({"x", "branch", "drop_scale", *outputs})
        return Call(self, leaves, given, {name: normal(*sizes) for name in outputs}, batched)


def by_definition(call: Call) -> Outputs:
    """The formulas; the sum in the inputs' own precision, the statistics of 16 bits in fp32."""
    x, branch = call.leaves["x"], call.leaves.get("branch")
    gamma, drop = call.leaves.get("gamma"), call.given.get("drop_scale")
    outputs: Outputs = {}
    y = x
    if branch is not None:
        if gamma is not None:
            branch = branch * gamma
        if drop is not None:
            branch = branch * drop[:, None, None]
        y = outputs["y"] = (x + branch).to(x.dtype)
    if "weight" in call.leaves:
        wide = y if y.dtype == torch.float64 else y.float()
        centred = wide - wide.mean(-1, keepdim=True)
        sigma = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        normed = centred / sigma * call.leaves["weight"]
        if "bias" in call.leaves:
            normed = normed + call.leaves["bias"]
        outputs["normed"] = normed.to(y.dtype)
    return outputs
