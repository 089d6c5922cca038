"""Training on the kernels and on the reference, from the same start: the loss curves stay together.

A small BEiT learns to name hidden patches of pictures whose patches follow from one another; every
operation of the student's step takes part. In fp32 the curves differ by rounding, which training
amplifies without end: weights that differ in their last bit end up at losses percents apart. So
they may part as the reference parts from itself after such a change, and by little before. In bf16,
under autocast, they differ by no more than bf16 by the reference differs from fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.correctness import Emit

CASE = "training curve"
DTYPES = ("float32", "bfloat16")
# fp32: relative, over the first steps, and over all on top of what a last bit does to the
# reference. The same bounds hold the project's steps to the official code's.
FIRST, FIRST_ALLOWED, ALLOWED = 10, 1e-5, 1e-3
LAST_BIT = 2.0**-24
# Of what the reference differs from itself by: in fp32 after a change of the weights' last bits, in
# bf16, over the last quarter, from fp32. And, relative to the loss, what two orders of summation in
# bf16 may differ by where that gap is nothing.
FACTOR, SLACK = 2.0, 1e-3
LEARNT = 0.9
"""Of the first loss, at most what the last one is: else nothing was compared."""


@dataclass(frozen=True)
class Lesson:
    """Sizes of the model and the run."""

    steps: int = 200
    batch: int = 64
    side: int = 7
    patch: int = 16
    width: int = 384
    depth: int = 4
    heads: int = 6
    codes: int = 512
    slots: int = 20
    learning_rate: float = 1e-3
    shaken: float = 0.0
    """By how much of itself each weight is off at the start, one in random direction."""

    def shrunk(self) -> Lesson:
        small = {"steps": 3, "batch": 2, "side": 3, "patch": 4, "width": 32, "depth": 1}
        return Lesson(**small, heads=2, codes=16, slots=4, learning_rate=3e-2)


def pictures(lesson: Lesson, step: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(images [B, 3, h, w], positions [B, M] with an empty slot, targets [B, M]) of a step.

    A patch's code goes up by the picture's own steps along rows and columns; its pixels are the
    code's pattern and noise. All from the CPU's generator, so that every device sees the same.
    """
    generator = torch.Generator().manual_seed(step)
    patterns = torch.randn(
        lesson.codes, 3, lesson.patch, lesson.patch, generator=torch.Generator().manual_seed(-1)
    )

    def draw(high: int) -> Tensor:
        return torch.randint(high, (lesson.batch, 1, 1), generator=generator)

    places = torch.arange(lesson.side)
    codes = draw(lesson.codes) + draw(4) * places[:, None] + draw(4) * places
    codes = codes % lesson.codes
    patches = patterns[codes]
    images = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    images = images + 0.3 * torch.randn(images.shape, generator=generator)
    order = torch.rand(lesson.batch, lesson.side**2, generator=generator).argsort(1)
    positions = order[:, : lesson.slots].sort(1).values.int()
    positions[0, -1] = -1
    targets = codes.flatten(1).gather(1, positions.clamp(min=0).long())
    return images.to(device), positions.to(device), targets.to(device)


def losses(lesson: Lesson, kernels: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Loss of each step, fp64 on the CPU."""
    from fastbeit.model import Backends, BeitConfig, BeitForMim

    config = BeitConfig(
        image_size=lesson.side * lesson.patch,
        patch_size=lesson.patch,
        width=lesson.width,
        depth=lesson.depth,
        heads=lesson.heads,
        vocab_size=lesson.codes,
    )
    model = BeitForMim(config, seed=0, backends=Backends(kernels=kernels)).to(device)
    if lesson.shaken:
        generator = torch.Generator().manual_seed(-2)
        with torch.no_grad():
            for weight in model.parameters():
                signs = torch.randn(weight.shape, generator=generator).sign().to(device)
                weight.mul_(1 + lesson.shaken * signs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lesson.learning_rate)
    found = []
    for step in range(lesson.steps):
        images, positions, targets = pictures(lesson, step, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.loss(images, positions, targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).double().cpu()


Curve = Callable[[Lesson, Any, torch.dtype, torch.device], Tensor]


def check_curve(
    dtype: str, device: torch.device, emit: Emit, *, shrink: bool, curve: Curve = losses
) -> None:
    """A row for one precision."""
    lesson = Lesson().shrunk() if shrink else Lesson()
    precision: torch.dtype = getattr(torch, dtype)
    ours = curve(lesson, "triton", precision, device)
    theirs = curve(lesson, "reference", precision, device)
    gaps = (ours - theirs).abs() / theirs
    reason = ""
    if not ours.isfinite().all():
        reason = "a loss is not finite"
    elif not shrink and not theirs[-1] <= LEARNT * theirs[0]:
        reason = f"the reference learnt nothing: {theirs[0]:.4f} to {theirs[-1]:.4f} nats"
    elif precision == torch.float32:
        shaken = curve(replace(lesson, shaken=LAST_BIT), "reference", precision, device)
        alone = ((shaken - theirs).abs() / theirs).cummax(0).values
        first = gaps[:FIRST].max().item()
        over = gaps - (ALLOWED + FACTOR * alone)
        if not first <= FIRST_ALLOWED:
            reason = (
                f"over the first {FIRST} steps the losses differ by {first:.1e} of theirs, "
                f"{FIRST_ALLOWED:g} at most"
            )
        elif not over.max() <= 0:
            step = int(over.argmax())
            reason = (
                f"at step {step + 1} the losses differ by {gaps[step]:.1e} of theirs, "
                f"{ALLOWED:g} at most and {FACTOR:g} times the {alone[step]:.1e} by which the "
                "reference has parted from itself"
            )
    else:
        exact = curve(lesson, "reference", torch.float32, device)
        last = max(1, lesson.steps // 4)
        gap = (ours - theirs)[-last:].abs().mean().item()
        band = FACTOR * (theirs - exact)[-last:].abs().mean().item()
        band += SLACK * exact[-last:].mean().item()
        if not gap <= band:
            reason = f"the last {last} losses differ by {gap:.1e} nats, {band:.1e} at most"
    emit(
        {
            "kind": "correctness",
            "check": "training curve",
            "case": CASE,
            "dtype": dtype,
            "status": "fail" if reason else "pass",
            "reason": reason,
            "steps": lesson.steps,
            "largest_gap": gaps.max().item(),
            "first_nats": theirs[0].item(),
            "last_nats": theirs[-1].item(),
        }
    )
