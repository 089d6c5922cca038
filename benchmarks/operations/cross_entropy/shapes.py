"""The masked head's loss: sizes, random inputs, least work, the formulas, and its own judge.

Shapes: B images, T tokens, M slots, D width, V classes, R = B·M rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.call import Call, Function, Outputs, results
from benchmarks.judge import Judgement, judge, judge_results
from benchmarks.operation import Pass
from benchmarks.roofline import FLOAT_BYTES, INDEX_BYTES, Work

# A fused multiply-add of a tensor core may cut what doesn't fit instead of rounding it.
ACCUMULATED = 2.0**-23
LOSS_UNITS = 4


@dataclass(frozen=True)
class Head:
    """``positions`` name rows of hidden, or the rows are selected already. ``scale`` of the logits,
    which are about N(0, scale²). ``repeated``: slots of one image that name the same row."""

    batch: int
    tokens: int
    slots: int
    width: int
    classes: int
    positions: bool = True
    bias: bool = True
    smoothing: float = 0.0
    empty: Literal["some", "none", "all"] = "some"
    repeated: bool = False
    scale: float = 1.0

    @property
    def rows(self) -> int:
        return self.batch * self.slots

    def describe(self) -> str:
        of = f" of {self.batch}×{self.tokens}" if self.positions else ""
        return f"{self.rows}{of}, {self.width} → {self.classes}"

    def shrunk(self) -> Head:
        """Few classes: the same whether they are a power of two or not."""
        few = self.classes & (self.classes - 1) == 0
        classes = min(self.classes, 64 if few else 37)
        slots = min(self.slots, 4)
        return replace(
            self,
            batch=min(self.batch, 3),
            tokens=min(self.tokens, 9),
            slots=slots,
            width=min(self.width, 16),
            classes=classes,
        )

    def work(self, direction: Pass, dtype: torch.dtype) -> Work:
        """A product forward, two backward; the logits stay on the chip. The gradient of hidden is
        written whole, rows that no slot names too."""
        if direction == "both":
            return self.work("forward", dtype) + self.work("backward", dtype)
        product = 2 * self.rows * self.width * self.classes
        weights = (self.width + self.bias) * self.classes
        rows = self.rows * self.width
        if direction != "backward":
            indices = (1 + self.positions) * self.rows * INDEX_BYTES
            return Work(product, (rows + weights) * dtype.itemsize + indices + FLOAT_BYTES)
        hidden = self.batch * (self.tokens if self.positions else self.slots) * self.width
        return Work(2 * product, (rows + 2 * weights + hidden) * dtype.itemsize)

    def make(self, dtype: torch.dtype, seed: int, device: torch.device) -> Call:
        """Half the images have the best class as a target, so that right answers are counted."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul(scale).to(dtype)

        tokens = self.tokens if self.positions else self.slots
        leaves = {
            "hidden": normal(self.batch, tokens, self.width),
            "weight": normal(self.classes, self.width, scale=self.scale * self.width**-0.5),
        }
        if self.bias:
            leaves["bias"] = normal(self.classes, scale=0.1 * self.scale)
        given: dict[str, Tensor] = {}
        if self.positions:
            drawn = torch.rand(self.batch, tokens - 1, generator=generator, device=device)
            positions = drawn.argsort(1)[:, : self.slots].add(1).sort(1).values
            if self.repeated:
                positions[:, 1] = positions[:, 0]
            given["positions"] = positions.to(torch.int32)
        size = (self.batch, self.slots)
        targets = torch.randint(self.classes, size, generator=generator, device=device)
        best = scores(leaves, rows_of(leaves["hidden"], given.get("positions")).float()).argmax(-1)
        half = self.batch - self.batch // 2
        targets[:half] = best.view(size)[:half]
        self._empty(given.get("positions"), targets)
        given["targets"] = targets
        dout = torch.tensor(1.5, device=device)
        return Call(self, leaves, given, {"loss": dout})

    def _empty(self, positions: Tensor | None, targets: Tensor) -> None:
        if self.empty == "none":
            return
        empty = torch.zeros_like(targets, dtype=torch.bool)
        empty[0, -1] = True
        empty[-1, : max(1, self.slots // 5)] = True
        if self.empty == "all":
            empty[:] = True
        if positions is None:
            targets[empty] = -1
        else:
            positions[empty] = -1
            # A target alone empties its slot as well.
            targets[0, 0] = -1


def rows_of(hidden: Tensor, positions: Tensor | None) -> Tensor:
    """``[R, D]``: rows that slots name; of an empty slot any."""
    if positions is None:
        return hidden.flatten(0, 1)
    image = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
    return hidden[image, positions.clamp(min=0).long()].flatten(0, 1)


def scores(leaves: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Logits of ``[R, D]`` in the precision of the rows."""
    product = rows @ leaves["weight"].to(rows.dtype).t()
    return product + leaves["bias"].to(rows.dtype) if "bias" in leaves else product


def filled_slots(call: Call) -> Tensor:
    filled = call.given["targets"] >= 0
    return filled & (call.given["positions"] >= 0) if "positions" in call.given else filled


def by_definition(call: Call) -> Outputs:
    """The formulas; logits in the inputs' own precision, what follows of 16 bits in fp32.

    For the judge also, of each slot: ``lead`` of the target's score over the best other, ``top``,
    the largest score in size, and ``mass``, what the terms of a score can add up to.
    """
    filled = filled_slots(call).flatten()
    rows = rows_of(call.leaves["hidden"], call.given.get("positions"))
    rows = torch.where(filled[:, None], rows, 0)
    logits = scores(call.leaves, rows)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    target = torch.where(filled, call.given["targets"].flatten(), 0)[:, None]
    logs = logits - torch.logsumexp(logits, -1, keepdim=True)
    sharp = -logs.gather(1, target)[:, 0]
    nats = (1 - call.shape.smoothing) * sharp - call.shape.smoothing * logs.mean(-1)
    count = filled.sum()
    loss = torch.where(filled, nats, 0).sum() / count.clamp(min=1)
    with torch.no_grad():
        others = logits.scatter(1, target, float("-inf")).amax(-1)
        right = (logits.argmax(-1) == target[:, 0]) & filled
        sizes = call.leaves["weight"].to(logits.dtype).norm(dim=1).amax()
        mass = rows.to(logits.dtype).norm(dim=1) * sizes
        if "bias" in call.leaves:
            mass = mass + call.leaves["bias"].abs().amax()
        more = {
            "lead": logits.gather(1, target)[:, 0] - others,
            "top": logits.abs().amax(-1),
            "mass": mass,
        }
    return {"loss": loss, "correct": right.sum(), "count": count, **more}


def judge_loss(call: Call, ours: Outputs, plain: Outputs, truth: Outputs) -> Judgement:
    """Gradients by norm; the count exactly; right answers but for what rounding decides.

    The loss is one number, and plain PyTorch may come near it by chance: a few units in its last
    place are allowed in fp32, as each row's log-sum-exp has them, and in 16 bits the usual slack,
    which the rounded logits would need if all of them erred alike.

    A logit is a sum of D products: its error is at most (D + 2)·2⁻²³ of what the terms' sizes add
    up to (which Cauchy and Schwarz bound), and half a unit of 16 bits where it is rounded to them.
    A slot whose target leads, or trails, by more than two such errors is decided.
    """
    tensors = {name: tensor for name, tensor in ours.items() if name.startswith("d")}
    judged = judge_results(call, tensors, plain, truth)
    dtype = call.leaves["hidden"].dtype
    eps = torch.finfo(dtype).eps
    slack = LOSS_UNITS * eps if dtype == torch.float32 else eps / 4
    loss = judge(ours["loss"], plain["loss"], truth["loss"], dtype, slack)
    judged.tensors["loss"] = loss.as_row()
    if not loss.passed:
        judged.reasons.append(f"loss: {loss.reason}")
    unit = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    error = unit * truth["top"] + (call.shape.width + 2) * ACCUMULATED * truth["mass"]
    filled = filled_slots(call).flatten()
    sure = int((filled & (truth["lead"] > 2 * error)).sum())
    unsure = int((filled & (truth["lead"].abs() <= 2 * error)).sum())
    count, correct = int(ours["count"]), int(ours["correct"])
    if count != int(truth["count"]):
        judged.reasons.append(f"count: {count}, expected {int(truth['count'])}")
    if not sure <= correct <= sure + unsure:
        judged.reasons.append(f"correct: {correct}, expected {sure} to {sure + unsure}")
    return judged


def empty_slots(function: Function, call: Call, mine: Outputs) -> str | None:
    """Targets of unnamed slots and rows that no filled slot names are not read."""
    filled = filled_slots(call)
    hidden, targets = call.leaves["hidden"].clone(), call.given["targets"].clone()
    named = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    positions = call.given.get("positions")
    if positions is None:
        named = filled
    else:
        image = torch.arange(hidden.shape[0], device=hidden.device)[:, None].expand_as(filled)
        named[image[filled], positions[filled].long()] = True
        targets[positions < 0] = call.shape.classes + 5
    hidden[~named] = float("nan")
    spoilt = replace(
        call,
        leaves={**call.leaves, "hidden": hidden},
        given={**call.given, "targets": targets},
    )
    found = results(function, spoilt)
    changed = [name for name in mine if not mine[name].equal(found[name])]
    return f"{', '.join(changed)} change with what no slot names" if changed else ""
