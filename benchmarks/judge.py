"""How right a result is: its distance from float64 beside that of plain PyTorch.

The bound is twice plain PyTorch's error at the same precision, by norm over a tensor. A single bad
element among many hides in a norm, so the largest deviation is bounded too, at three times plain's:
the same factor of two, and half as much again because the largest of many errors scatters. Where
plain PyTorch happens to be exact (a short sum can be), one rounding of the result is allowed on
top: its relative error by norm is about a quarter of eps in 16 bits; in fp32, where a tensor may be
a handful of sums, a whole eps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.call import Call

NORM_FACTOR = 2.0
PEAK_FACTOR = 3.0


@dataclass(frozen=True)
class Verdict:
    """Relative errors of one tensor, ours and plain's: by norm and at the worst element."""

    norm: float
    plain_norm: float
    peak: float
    plain_peak: float
    passed: bool
    reason: str = ""

    def as_row(self) -> dict[str, object]:
        row: dict[str, object] = {
            "norm": self.norm,
            "plain_norm": self.plain_norm,
            "peak": self.peak,
            "plain_peak": self.plain_peak,
            "passed": self.passed,
        }
        if self.reason:
            row["reason"] = self.reason
        return row


def distances(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """(norm of the difference / norm of the truth, largest difference / largest of the truth)."""
    difference, truth = value.double() - truth.double(), truth.double()
    if difference.numel() == 0:
        return 0.0, 0.0
    norm = difference.norm() / truth.norm().clamp_min(1e-300)
    peak = difference.abs().max() / truth.abs().max().clamp_min(1e-300)
    return norm.item(), peak.item()


def judge(
    ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, slack: float | None = None
) -> Verdict:
    """``dtype`` is that of the inputs, ``slack`` what is allowed on top; NaN and infinity never
    pass."""
    norm, peak = distances(ours, truth)
    plain_norm, plain_peak = distances(plain, truth)
    eps = torch.finfo(dtype).eps
    if slack is None:
        slack = eps if dtype == torch.float32 else eps / 4
    reason = ""
    if ours.shape != truth.shape:
        reason = f"shape {list(ours.shape)}, expected {list(truth.shape)}"
    elif not ours.isfinite().all():
        reason = f"{(~ours.isfinite()).sum().item()} elements are not finite"
    elif not norm <= NORM_FACTOR * plain_norm + slack:
        reason = f"error {norm:.2e} is over {NORM_FACTOR:g} times plain PyTorch's {plain_norm:.2e}"
    elif not peak <= PEAK_FACTOR * plain_peak + slack:
        reason = (
            f"largest error {peak:.2e} is over {PEAK_FACTOR:g} times plain PyTorch's "
            f"{plain_peak:.2e}"
        )
    return Verdict(norm, plain_norm, peak, plain_peak, not reason, reason)


@dataclass
class Judgement:
    """Of all results of a call: why it fails, if it does, and what to show of it."""

    reasons: list[str]
    worst_ratio: float | None = None
    """The largest error in multiples of plain PyTorch's, where they are compared."""
    tensors: dict[str, dict[str, object]] = field(default_factory=dict)


def judge_results(
    call: Call, ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> Judgement:
    """`judge` for each of our results, with the slack of the call's least precise input."""
    dtype = coarsest([*call.leaves.values(), *call.douts.values()])
    return gathered(
        ours, truth, {name: judge(ours[name], plain[name], truth[name], dtype) for name in ours}
    )


def judge_in_own_precision(
    call: Call, ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> Judgement:
    """`judge` for each of our results, with the slack of its own precision."""
    return gathered(
        ours,
        truth,
        {name: judge(x, plain[name], truth[name], x.dtype) for name, x in ours.items()},
    )


def gathered(
    ours: Mapping[str, Tensor], truth: Mapping[str, Tensor], verdicts: Mapping[str, Verdict]
) -> Judgement:
    missing = [name for name in truth if name.startswith("d") and name not in ours]
    reasons = [f"{name}: {found.reason}" for name, found in verdicts.items() if not found.passed]
    reasons += [f"{name}: missing" for name in missing]
    ratios = [v.norm / v.plain_norm if v.plain_norm else 0.0 for v in verdicts.values()]
    tensors = {name: verdict.as_row() for name, verdict in verdicts.items()}
    return Judgement(reasons, max(ratios, default=0.0), tensors)


def coarsest(tensors: list[Tensor]) -> torch.dtype:
    """The dtype with the largest rounding."""
    dtypes: list[Any] = [tensor.dtype for tensor in tensors]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
