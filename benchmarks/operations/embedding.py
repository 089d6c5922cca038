"""embed_patches: everything about it.

Shapes: B images, C channels, p patch side, N patches, M slots, D width, K = C·p².
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastbeit_kernels
from benchmarks.call import Call, Function, Outputs, results
from benchmarks.operation import OURS, Case, Operation, Pass, Peer, Problem
from benchmarks.peers import compiled, plainly
from benchmarks.roofline import Work
from benchmarks.targets import Target


@dataclass(frozen=True)
class Patches:
    """``masked``: slots of an image, or None for no masking; ``empty``: which of them name none."""

    batch: int
    side: int = 224
    patch: int = 16
    width: int = 768
    channels: int = 3
    masked: int | None = 75
    empty: Literal["some", "none", "all"] = "some"
    channels_last: bool = False
    pos_embed: bool = False
    bias: bool = True

    @property
    def count(self) -> int:
        return (self.side // self.patch) ** 2

    def describe(self) -> str:
        masked = "none" if self.masked is None else f"{self.masked}"
        order = ", channels last" if self.channels_last else ""
        return f"{self.batch}×{self.channels}×{self.side}² by {self.patch}², {masked} masked{order}"

    def shrunk(self) -> Patches:
        patch = 4 if self.patch % 16 == 0 else 3
        side, count = 3 * patch, 9
        full = self.masked == self.count
        masked = None if self.masked is None else count if full else min(self.masked, 4)
        small = replace(self, batch=min(self.batch, 2), side=side, patch=patch, masked=masked)
        return replace(small, width=min(self.width, 16 + self.width % 3))

    def work(self, direction: Pass, dtype: torch.dtype) -> Work:
        """Patches that are not masked are read and projected; backward, their pixels once more and
        the gradient of every token."""
        if direction == "both":
            return self.work("forward", dtype) + self.work("backward", dtype)
        taken = self.channels * self.patch**2
        rows = self.batch * (self.count - (self.masked or 0))
        tokens = self.batch * (self.count + 1) * self.width
        weights = (taken + self.bias + 1 + (self.masked is not None)) * self.width
        weights += (self.count + 1) * self.width if self.pos_embed else 0
        elements = rows * taken + tokens + weights
        indices = 4 * self.batch * (self.masked or 0)
        return Work(2 * rows * taken * self.width, elements * dtype.itemsize + indices)

    def make(self, dtype: torch.dtype, seed: int, device: torch.device) -> Call:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul(scale).to(dtype)

        images = normal(self.batch, self.channels, self.side, self.side)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        given = {"images": images}
        kernel = (self.channels, self.patch, self.patch)
        leaves = {
            "weight": normal(self.width, *kernel, scale=(self.channels * self.patch**2) ** -0.5)
        }
        for name in ("bias", "cls_token", "mask_token"):
            if name == "cls_token" or (self.bias if name == "bias" else self.masked is not None):
                leaves[name] = normal(self.width)
        if self.pos_embed:
            leaves["pos_embed"] = normal(self.count + 1, self.width)
        if self.masked is not None:
            drawn = torch.rand(self.batch, self.count, generator=generator, device=device)
            positions = drawn.argsort(1)[:, : self.masked].to(torch.int32)
            if self.empty == "some":
                positions[0, -1] = positions[-1, : max(1, self.masked // 5)] = -1
            elif self.empty == "all":
                positions[:] = -1
            given["positions"] = positions
        dout = normal(self.batch, self.count + 1, self.width)
        return Call(self, leaves, given, {"out": dout}, frozenset({"images", "positions", "out"}))


def ours(impl: Any) -> Function:
    """The public function of fastbeit_kernels."""

    def function(call: Call) -> Outputs:
        leaves = call.leaves
        return {
            "out": fastbeit_kernels.embed_patches(
                call.given["images"],
                leaves["weight"],
                leaves.get("bias"),
                leaves["cls_token"],
                positions=call.given.get("positions"),
                mask_token=leaves.get("mask_token"),
                pos_embed=leaves.get("pos_embed"),
                impl=impl,
            )
        }

    return function


def masked_patches(call: Call) -> Tensor:
    """bool ``[B, N]``: those that a slot names."""
    images, positions = call.given["images"], call.given.get("positions")
    patch = call.shape.patch
    count = (images.shape[2] // patch) * (images.shape[3] // patch)
    numbers = torch.arange(count, device=images.device)
    if positions is None:
        return torch.zeros(images.shape[0], count, dtype=torch.bool, device=images.device)
    return (positions[:, :, None] == numbers).any(1)


def by_definition(call: Call) -> Outputs:
    """Patches laid out as rows, a matrix product, the masked ones replaced, CLS, positions."""
    leaves, weight, images = call.leaves, call.leaves["weight"], call.given["images"]
    patch = call.shape.patch
    split = images.unflatten(3, (-1, patch)).unflatten(
        2, (-1, patch)
    )  # [B, C, rows, p, columns, p]
    pixels = split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).to(weight.dtype)
    masked = masked_patches(call)[:, :, None]
    # Nothing of a masked patch may reach a gradient, not even as 0 · NaN.
    rows = torch.where(masked, 0, pixels) @ weight.flatten(1).t()
    rows = rows + leaves["bias"] if "bias" in leaves else rows
    if "mask_token" in leaves:
        rows = torch.where(masked, leaves["mask_token"], rows)
    tokens = torch.cat([leaves["cls_token"].expand(rows.shape[0], 1, -1), rows], 1)
    return {"out": tokens + leaves["pos_embed"] if "pos_embed" in leaves else tokens}


def unseen(function: Function, call: Call, mine: Outputs) -> str | None:
    """The pixels of masked patches change nothing."""
    masked = masked_patches(call)
    if not masked.any():
        return None
    images, patch = call.given["images"].clone(), call.shape.patch
    rows = images.shape[2] // patch
    pixels = masked.view(-1, 1, rows, images.shape[3] // patch)
    pixels = pixels.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    images.masked_fill_(pixels, float("nan"))
    found = results(function, replace(call, given={**call.given, "images": images}))
    changed = [name for name in mine if not mine[name].equal(found[name])]
    return f"{', '.join(changed)} change with masked pixels" if changed else ""


def eager(call: Call) -> Outputs:
    """As BEiT writes it: all patches convolved, the masked ones blended out by weights."""
    leaves, positions = call.leaves, call.given.get("positions")
    patch = call.shape.patch
    projected = F.conv2d(call.given["images"], leaves["weight"], leaves.get("bias"), stride=patch)
    rows = projected.flatten(2).transpose(1, 2)
    if positions is not None:
        mask = rows.new_zeros(rows.shape[0], rows.shape[1] + 1)
        mask = mask.scatter(1, positions.long() + 1, 1.0)[:, 1:, None]
        rows = rows * (1 - mask) + leaves["mask_token"] * mask
    tokens = torch.cat([leaves["cls_token"].expand(rows.shape[0], 1, -1), rows], 1)
    return {"out": tokens + leaves["pos_embed"] if "pos_embed" in leaves else tokens}


PEERS = (
    Peer(OURS, plainly(ours("triton")), ours=True),
    Peer("eager PyTorch", plainly(eager)),
    Peer("conv2d and where (reference)", plainly(ours("reference"))),
    Peer("torch.compile max-autotune", compiled(plainly(eager)), slow=True),
    Peer("torch.compile of the reference", compiled(plainly(ours("reference"))), slow=True),
)

_BEIT = Patches(3)
# In order of worth.
CASES = (
    Case("patches of BEiT", "75 of 196 masked, empty slots", _BEIT, machinery=True),
    Case(
        "patches of BEiT at full size",
        "the batch of training",
        Patches(128),
        ("bfloat16",),
        1,
    ),
    Case(
        "patches, channels last", "as the loader gives images", replace(_BEIT, channels_last=True)
    ),
    Case("patches of 14", "256 patches, K = 588", Patches(2, patch=14, pos_embed=True)),
    Case(
        "patches of 14, channels last",
        "rows of 42 elements",
        Patches(2, patch=14, channels_last=True),
    ),
    Case("patches, all masked", "nothing to project", replace(_BEIT, masked=196, empty="none")),
    Case("patches, no slot filled", "everything to project", replace(_BEIT, empty="all")),
    Case("patches, no masking", "validation, fine-tuning", replace(_BEIT, masked=None)),
    Case(
        "patches, small",
        "odd width, no bias, absolute positions",
        Patches(3, side=32, patch=8, width=77, masked=5, pos_embed=True, bias=False),
        sanitized=True,
    ),
    Case("patches of one image", "nothing to sum over", Patches(1, width=1024)),
)

_B = Patches(128, empty="none")
# In order of worth.
PROBLEMS = (
    Problem("BEiT-B, patch embedding", _B, worth=0),
    Problem("BEiT-B, patch embedding, channels last", replace(_B, channels_last=True)),
    Problem("BEiT-L, patch embedding", replace(_B, batch=64, width=1024), worth=2),
    Problem(
        "ViT-B, patch embedding, none masked", replace(_B, masked=None, pos_embed=True), worth=2
    ),
)

# "Ahead of every peer" is all that is wanted of it.
TARGETS: tuple[Target, ...] = ()

OPERATION = Operation(
    name="patch embedding",
    about="patches projected, masked ones replaced and not computed, CLS and positions added",
    ours=ours,
    definition=by_definition,
    cases=CASES,
    problems=PROBLEMS,
    peers=PEERS,
    targets=TARGETS,
    share=0.08,
    cast=frozenset({"images", "weight", "bias"}),
    cast_exactly=False,
    shares_tiles=True,
    checks={"masked pixels": unseen},
)
