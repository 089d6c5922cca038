"""Targets, and what the rows say of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import peers, problems

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """At most ``limit_us`` for a pass of a problem on one H100 SXM."""

    name: str
    problem: str
    direction: str
    limit_us: float


GPU = "H100"
_FORWARD = "attention forward, 128 images"
_BACKWARD = "attention backward with dBias, 128 images"
TARGETS = (
    Target(f"{_FORWARD}: at most 85 µs", problems.BASE.name, "forward", 85.0),
    Target(f"{_FORWARD}: goal of 75 µs", problems.BASE.name, "forward", 75.0),
    Target(f"{_BACKWARD}: at most 250 µs", problems.BASE.name, "backward", 250.0),
    Target(f"{_BACKWARD}: goal of 200 µs", problems.BASE.name, "backward", 200.0),
    Target(f"{_BACKWARD}: stretch of 150 µs", problems.BASE.name, "backward", 150.0),
)


def latest_timings(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Row]:
    """Timed rows by (problem, pass, tier, contestant); a repeated attempt replaces the earlier."""
    return {
        (row["problem"], row["pass"], row["tier"], row["contestant"]): row
        for row in rows
        if row["kind"] == "timing" and row["status"] == "ok"
    }


def correctness_verdict(rows: Iterable[Row]) -> Row:
    checks = [row for row in rows if row["kind"] in ("correctness", "sanitizer")]
    count = {status: sum(row["status"] == status for row in checks) for status in ("pass", "fail")}
    failed = [_named(row) for row in checks if row["status"] == "fail"]
    if failed:
        status = "missed"
    else:
        status = "met" if count["pass"] else "not measured"
    return {
        "kind": "verdict",
        "target": "every check of correctness passes",
        "status": status,
        "measured": f"{count['pass']} passed, {count['fail']} failed",
        "reason": "; ".join(failed[:20]),
    }


def _named(row: Row) -> str:
    if row["kind"] == "sanitizer":
        return f"{row['tool']} of {row['case']}"
    return f"{row['check']} of {row['case']} in {row['dtype']}"


def verdicts(rows: list[Row], gpu: str | None) -> list[Row]:
    """One row a target: met, missed or not measured. Without a GPU no time counts."""
    timings = {} if gpu is None else latest_timings(rows)
    found = [correctness_verdict(rows)]
    note = "" if gpu is not None and GPU in gpu else f"set for {GPU}, measured on {gpu or 'no GPU'}"
    for target in TARGETS:
        row = timings.get((target.problem, target.direction, "quick", peers.OURS))
        found.append(
            _verdict(target.name, None if row is None else 1e3 * row["ms"], target.limit_us, note)
        )
    for direction in ("forward", "backward"):
        name = f"{direction}, with a trained bias: faster than FlashAttention-2 without any"
        mine, theirs = (
            timings.get((problems.BASE_SEPARATE.name, direction, "quick", who))
            for who in (peers.OURS, peers.FLASH2)
        )
        found.append(
            _verdict(
                name,
                None if mine is None else 1e3 * mine["ms"],
                None if theirs is None else 1e3 * theirs["ms"],
                "",
            )
        )
    found += _against_peers(timings)
    return found


def _verdict(name: str, measured_us: float | None, limit_us: float | None, note: str) -> Row:
    row: Row = {"kind": "verdict", "target": name, "limit_us": limit_us, "reason": note}
    if measured_us is None or limit_us is None:
        return {**row, "status": "not measured", "measured": "not measured"}
    status = "met" if measured_us <= limit_us else "missed"
    return {**row, "status": status, "measured": f"{measured_us:.1f} µs of {limit_us:.1f}"}


def _against_peers(timings: dict[tuple[str, str, str, str], Row]) -> list[Row]:
    """Ours against the best peer that does the same work, per problem and pass, over all tiers.

    Within a tier contestants are interleaved, so ratios are taken there and the worst one counts.
    """
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for (problem, direction, tier, who), row in timings.items():
        mine = timings.get((problem, direction, tier, peers.OURS))
        if who == peers.OURS or row["work"] != "same" or mine is None:
            continue
        ratio = mine["ms"] / row["ms"]
        if (problem, direction) not in worst or ratio > worst[problem, direction][0]:
            worst[problem, direction] = (ratio, who)
    return [
        {
            "kind": "verdict",
            "target": f"{problem}, {direction}: ahead of every peer",
            "status": "met" if ratio < 1 else "missed",
            "measured": f"{ratio:.2f} times the best peer's time ({who})",
            "reason": "",
        }
        for (problem, direction), (ratio, who) in worst.items()
    ]
