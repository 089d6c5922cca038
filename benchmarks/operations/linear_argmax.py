"""linear_argmax: everything about it.

Shapes: R rows, D width, V classes. It has no gradient. A choice is no number to take a norm of: it
is judged by the score, in float64, of the class that was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastbeit_kernels
from benchmarks.call import Call, Function, Outputs
from benchmarks.judge import Judgement
from benchmarks.operation import OURS, Case, Operation, Pass, Peer, Problem, largest_error
from benchmarks.peers import compiled, plainly
from benchmarks.roofline import INDEX_BYTES, Work
from benchmarks.targets import Against, Target

# A fused multiply-add of a tensor core may cut what doesn't fit instead of rounding it.
ACCUMULATED = 2.0**-23


@dataclass(frozen=True)
class Scores:
    """``ties``: inputs are small whole numbers, so that scores are exact in whatever order they are
    summed and equal ones abound; and the second half of the classes repeats the first."""

    rows: int
    width: int
    classes: int
    bias: bool = True
    ties: bool = False

    def describe(self) -> str:
        return f"{self.rows}, {self.width} → {self.classes}"

    def shrunk(self) -> Scores:
        classes = min(self.classes, 70 if self.ties else 70 + self.classes % 3)
        width = min(self.width, 16 + self.width % 5)
        return replace(self, rows=min(self.rows, 9), width=width, classes=classes)

    def work(self, direction: Pass, dtype: torch.dtype) -> Work:
        elements = (self.rows + self.classes) * self.width + self.bias * self.classes
        moved = elements * dtype.itemsize + self.rows * INDEX_BYTES
        return Work(2 * self.rows * self.width * self.classes, moved)

    def make(self, dtype: torch.dtype, seed: int, device: torch.device) -> Call:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul(scale).to(dtype)

        given = {
            "x": normal(self.rows, self.width),
            "weight": normal(self.classes, self.width, scale=self.width**-0.5),
        }
        if self.bias:
            given["bias"] = normal(self.classes, scale=0.1)
        if self.ties:
            given["weight"] = (given["weight"] * self.width**0.5).round().clamp(-2, 2)
            given["x"] = given["x"].round().clamp(-2, 2)
            if self.bias:
                given["bias"] = (10 * given["bias"]).round()
            half = self.classes // 2
            for name in set(given) - {"x"}:
                given[name][half : 2 * half] = given[name][:half]
        return Call(self, {}, given, {}, frozenset({"x", "index"}))


def ours(impl: Any) -> Function:
    """The public function of fastbeit_kernels."""

    def function(call: Call) -> Outputs:
        x, weight, bias = (call.given.get(name) for name in ("x", "weight", "bias"))
        assert x is not None and weight is not None
        return {"index": fastbeit_kernels.linear_argmax(x, weight, bias, impl=impl)}

    return function


def by_definition(call: Call) -> Outputs:
    """Scores of 16 bits in fp32. Of equals, the lowest index (`argmax` gives the first)."""
    given = call.given
    wide = torch.promote_types(given["x"].dtype, torch.float32)
    scores = given["x"].to(wide) @ given["weight"].to(wide).t()
    if "bias" in given:
        scores = scores + given["bias"].to(wide)
    return {"index": scores.argmax(-1), "scores": scores}


def regret_and_bound(call: Call, index: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """How far the chosen score is below the best, and how far rounding may put it, of each row.

    A score is a sum of D products and a bias; the error of such a sum in fp32 is at most
    (D + 2)·2⁻²³ of the sum of the terms' sizes, in whatever order it is added. Who chose by
    computed scores can be wrong by the error of the chosen one and that of the best.
    """
    x, weight = (call.given[name].double().abs() for name in ("x", "weight"))
    chosen, best = index[:, None], scores.argmax(-1, keepdim=True)
    sizes = torch.stack([(x * weight[pick[:, 0]]).sum(-1) for pick in (chosen, best)]).sum(0)
    if "bias" in call.given:
        bias = call.given["bias"].double().abs()
        sizes = sizes + bias[chosen[:, 0]] + bias[best[:, 0]]
    regret = (scores.gather(1, best) - scores.gather(1, chosen))[:, 0]
    return regret, (x.shape[1] + 2) * ACCUMULATED * sizes


def judge_choice(call: Call, ours: Outputs, plain: Outputs, truth: Outputs) -> Judgement:
    """No choice worse than rounding allows; the exact one in as many rows as plain fp32 PyTorch."""
    index, exact = ours["index"], truth["index"]
    if index.shape != exact.shape or index.dtype != torch.int64:
        return Judgement([f"index: {index.dtype} {list(index.shape)}"])
    classes = truth["scores"].shape[1]
    if not ((index >= 0) & (index < classes)).all():
        return Judgement([f"index: outside [0, {classes})"])
    regret, bound = regret_and_bound(call, index, truth["scores"])
    over = int((regret > bound).sum())
    right, plain_right = (int((x == exact).sum()) for x in (index, plain["index"]))
    reasons = []
    if over:
        worst = (regret / bound).max().item()
        reasons.append(f"index: {over} choices are worse than rounding explains, {worst:.1f} times")
    if right < plain_right:
        reasons.append(f"index: {right} choices are exact, plain PyTorch's {plain_right}")
    more = {"rows": exact.numel(), "exact": right, "plain_exact": plain_right}
    return Judgement(reasons, None, {"index": {**more, "passed": not reasons}})


def lowest_of_equals(_function: Function, call: Call, mine: Outputs) -> str | None:
    """Where sums are exact, the choice is: the first of the largest."""
    if not call.shape.ties:
        return None
    exact = by_definition(call.to(torch.float64))["index"]
    late = int((mine["index"] != exact).sum())
    return f"{late} rows took another than the lowest of equal classes" if late else ""


def error(call: Call, found: Outputs, truth: Outputs) -> float:
    """Of a yardstick's scores, by norm; of a choice, the share of rows worse than rounding
    explains (its own in fp32, and that of the fp32 truth)."""
    if "index" not in found:
        return largest_error(call, found, truth)
    regret, bound = regret_and_bound(call, found["index"], truth["scores"].double())
    return (regret > 2 * bound).double().mean().item()


def in_16_bits(call: Call) -> Outputs:
    """As a convolution head does it: scores rounded to the inputs' precision tie by the dozen."""
    given = call.given
    scores = F.linear(given["x"], given["weight"], given.get("bias"))
    return {"rounded index": scores.argmax(-1), "scores": scores}


def gemm(call: Call) -> Outputs:
    given = call.given
    return {"scores": F.linear(given["x"], given["weight"], given.get("bias"))}


GEMM = "bare GEMM with its bias"
PEERS = (
    Peer(OURS, plainly(ours("triton")), ours=True),
    Peer(GEMM, plainly(gemm), less="no argmax"),
    Peer("mm into fp32, argmax (reference)", plainly(ours("reference"))),
    Peer("linear, argmax", plainly(in_16_bits), less="scores in 16 bits"),
    Peer("torch.compile of mm into fp32, argmax", compiled(plainly(ours("reference"))), slow=True),
    Peer(
        "torch.compile of linear, argmax",
        compiled(plainly(in_16_bits)),
        slow=True,
        less="scores in 16 bits",
    ),
)

# In order of worth.
CASES = (
    Case("argmax of a tokenizer", "its width and classes", Scores(200, 2048, 8192), machinery=True),
    Case(
        "argmax at full size",
        "75 patches of 128 images",
        Scores(9600, 2048, 8192),
        ("bfloat16", "float16"),
        1,
    ),
    Case("argmax, ties", "the lowest index wins", Scores(100, 256, 8192, ties=True)),
    Case("argmax, ragged", "no size fills a tile", Scores(75, 77, 1003), sanitized=True),
    Case("argmax, 10 classes", "less than a tile", Scores(40, 64, 10), sanitized=True),
    Case("argmax, 65,536 classes", "the most there are", Scores(50, 64, 65_536)),
    Case("argmax of one row", "a row alone, no bias", Scores(1, 2048, 8192, bias=False)),
)

MASKED = Problem(
    "tokenizer head, 9,600 rows", Scores(9600, 2048, 8192), passes=("forward",), worth=0
)
# In order of worth.
PROBLEMS = (
    MASKED,
    Problem("tokenizer head, 25,088 rows", Scores(25_088, 2048, 8192), passes=("forward",)),
)

TARGETS: tuple[Target, ...] = (
    Against(
        "linear_argmax, 9,600 rows: within 25 % of the bare GEMM",
        MASKED.name,
        "forward",
        GEMM,
        1.25,
    ),
)

OPERATION = Operation(
    name="linear_argmax",
    about="argmax of x Wᵀ + b without writing the scores",
    ours=ours,
    definition=by_definition,
    cases=CASES,
    problems=PROBLEMS,
    peers=PEERS,
    targets=TARGETS,
    share=0.12,
    checks={"lowest of equals": lowest_of_equals},
    judge=judge_choice,
    error=error,
    # Relative error of scores in 16 bits, or the share of rows chosen wrongly.
    error_allowed=0.01,
)
