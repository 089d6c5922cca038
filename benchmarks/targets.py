"""Targets, and what the rows say of them, each by ours in the quick group of a problem."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

Row = dict[str, Any]
OURS = "fastbeit_kernels"


class Measured:
    """What the targets look at. A repeated attempt replaces the earlier one."""

    def __init__(self, rows: Iterable[Row]) -> None:
        kept = [row for row in rows if row.get("status") == "ok"]
        self.timings: dict[tuple[str, str, str, str], Row] = {
            (row["problem"], row["pass"], row["tier"], row["contestant"]): row
            for row in kept
            if row["kind"] == "timing"
        }
        self.kernels: dict[str, Row] = {
            row["problem"]: row for row in kept if row["kind"] == "kernels"
        }

    def ms(self, problem: str, direction: str, who: str = OURS) -> float | None:
        row = self.timings.get((problem, direction, "quick", who))
        return None if row is None else row["ms"]


class Target(Protocol):
    @property
    def name(self) -> str: ...

    def judge(self, measured: Measured) -> Row | None:
        """``status``, ``measured``, ``limit_us`` and, where its GPU matters, ``absolute``; None
        where it was not measured."""
        ...


@dataclass(frozen=True)
class AtMost:
    """At most ``limit_us`` for a pass of a problem, on one H100 SXM."""

    name: str
    problem: str
    direction: str
    limit_us: float

    def judge(self, measured: Measured) -> Row | None:
        ms = measured.ms(self.problem, self.direction)
        return None if ms is None else {**compared(1e3 * ms, self.limit_us), "absolute": True}


@dataclass(frozen=True)
class Against:
    """At most ``factor`` times what a yardstick takes in the same group."""

    name: str
    problem: str
    direction: str
    yardstick: str
    factor: float = 1.0

    def judge(self, measured: Measured) -> Row | None:
        ms = measured.ms(self.problem, self.direction)
        theirs = measured.ms(self.problem, self.direction, self.yardstick)
        if ms is None or theirs is None:
            return None
        return compared(1e3 * ms, 1e3 * self.factor * theirs)


@dataclass(frozen=True)
class OfCopy:
    """At least ``share`` of the bandwidth at which the device copies, by the bytes of the work."""

    name: str
    problem: str
    direction: str
    share: float

    def judge(self, measured: Measured) -> Row | None:
        row = measured.timings.get((self.problem, self.direction, "quick", OURS))
        reached = None if row is None else row.get("fraction_of_copy")
        return None if reached is None else share_of_copy(reached, self.share)


@dataclass(frozen=True)
class KernelOfCopy:
    """The same of one kernel of ours, by the bytes it moves, under the profiler."""

    name: str
    problem: str
    kernel: str
    share: float

    def judge(self, measured: Measured) -> Row | None:
        row = measured.kernels.get(self.problem)
        reached = None if row is None else (row.get("fraction_of_copy") or {}).get(self.kernel)
        return None if reached is None else share_of_copy(reached, self.share)


def compared(us: float, limit_us: float) -> Row:
    status = "met" if us <= limit_us else "missed"
    return {"status": status, "measured": f"{us:.1f} µs of {limit_us:.1f}", "limit_us": limit_us}


def share_of_copy(reached: float, wanted: float) -> Row:
    status = "met" if reached >= wanted else "missed"
    measured = f"{100 * reached:.0f} % of {100 * wanted:.0f} %"
    return {"status": status, "measured": measured, "limit_us": None}
