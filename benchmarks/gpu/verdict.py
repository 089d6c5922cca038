"""What the rows say of the targets of every operation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.operation import OURS, SAME
from benchmarks.operations import OPERATIONS
from benchmarks.targets import Measured, Target

Row = dict[str, Any]

GPU = "H100"


def targets() -> list[Target]:
    return [target for operation in OPERATIONS for target in operation.targets]


def latest_timings(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Row]:
    """Timed rows by (problem, pass, tier, contestant); a repeated attempt replaces the earlier."""
    return Measured(rows).timings


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
    measured = Measured(rows if gpu is not None else [])
    found = [correctness_verdict(rows)]
    note = "" if gpu is not None and GPU in gpu else f"set for {GPU}, measured on {gpu or 'no GPU'}"
    for target in targets():
        judged = target.judge(measured)
        row: Row = {"kind": "verdict", "target": target.name}
        if judged is None:
            found.append(
                {**row, "status": "not measured", "measured": "not measured", "reason": ""}
            )
            continue
        absolute = judged.pop("absolute", False)
        found.append({**row, **judged, "reason": note if absolute else ""})
    found += _against_peers(measured.timings)
    return found


def _against_peers(timings: dict[tuple[str, str, str, str], Row]) -> list[Row]:
    """Ours against the best peer that does the same work, per problem and pass, over all tiers.

    Within a tier contestants are interleaved, so ratios are taken there and the worst one counts.
    """
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for (problem, direction, tier, who), row in timings.items():
        mine = timings.get((problem, direction, tier, OURS))
        if who == OURS or row["work"] != SAME or mine is None:
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
