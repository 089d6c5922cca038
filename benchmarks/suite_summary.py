"""A run of the suites in tables: one a suite, each row beside its reference twin."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.summary import number
from benchmarks.suite_rows import REFERENCE, Key, Row, ratio, told

HEAD = (
    "| part | sizes | path | dtype | ms | p10–p90 | n | images/s | GFLOP/s | GB/s | of the limit "
    "| peak MB | × the reference's speed |"
)


def summary(environment: Mapping[str, Any], rows: dict[Key, Row]) -> str:
    """summary.md."""
    return "\n\n".join([_head(environment, rows), *tables(rows)]) + "\n"


def _head(environment: Mapping[str, Any], rows: Mapping[Key, Row]) -> str:
    counts = {state: sum(row["status"] == state for row in rows.values()) for state in STATES}
    lines = [f"# Suites on {environment['device']}", "", *about(environment)]
    lines.append("- " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return "\n".join(lines)


STATES = ("ok", "skipped", "failed")
BUSY = 0.5
"""Load average a core above which a run didn't have the machine to itself."""


def about(environment: Mapping[str, Any]) -> list[str]:
    """Where the figures come from, as a list."""
    cpu, packages = environment["cpu"], environment["packages"]
    lines = [
        f"- started {environment['started']}, ended {environment['ended'] or 'never'}, command "
        f"`{shlex.join(environment['command'])}`",
        f"- source {environment['commit'] or environment['source_sha256'][:12]}"
        + (" with changes of its own" if environment["dirty"] else ""),
        f"- {cpu['name']}, {cpu['usable_cores']:g} cores, threads: {environment['threads']}; load "
        f"average {told_load(environment.get('load_at_start'))} at the start, "
        f"{told_load(environment.get('load_at_end'))} at the end",
        f"- Python {environment['python']}, "
        + ", ".join(f"{name} {version}" for name, version in packages.items() if version),
    ]
    at_start = environment.get("load_at_start")
    if at_start is not None and at_start[0] > BUSY * cpu["usable_cores"]:
        lines.append(
            "- **other work was running when this began**: times are longer than they would be, "
            "and ratios less sure"
        )
    for dtype, limit in (environment.get("ceilings") or {}).items():
        lines.append(
            f"- limit of {dtype}: {1e3 * limit['tflops']:.1f} GFLOP/s, "
            f"{1e3 * limit['tb_per_s']:.1f} GB/s ({limit['source']})"
        )
    return lines


def told_load(load: list[float] | None) -> str:
    return "unknown" if load is None else f"{load[0]:.2f}"


def tables(rows: dict[Key, Row], level: str = "##") -> list[str]:
    """One a suite: what was timed, then what was not and why."""
    return [
        f"{level} {suite}\n\n"
        + table({key: row for key, row in rows.items() if key.suite == suite})
        for suite in dict.fromkeys(key.suite for key in rows)
    ]


def table(rows: dict[Key, Row]) -> str:
    lines = []
    timed = [key for key, row in rows.items() if row["status"] == "ok"]
    if timed:
        lines += [HEAD, "|---" * HEAD.count(" |") + "|"]
        lines += [_line(key, rows) for key in sorted(timed, key=_together(timed))]
    absent = [(key, row) for key, row in rows.items() if row["status"] != "ok"]
    if absent and lines:
        lines.append("")
    whose: dict[str, list[str]] = {}
    for key, row in absent:
        words = [key.part, told_sizes(key), key.path, key.dtype]
        reason = f"{row['status']}: {row['reason'].replace('|', '/')}"
        whose.setdefault(reason, []).append(", ".join(word for word in words if word))
    lines += [f"- {reason}\n  - " + "\n  - ".join(names) for reason, names in whose.items()]
    return "\n".join(lines)


def _together(keys: list[Key]) -> Any:
    """Twins side by side, in the order in which the first of them came."""
    places: dict[tuple[str, str], int] = {}
    for key in keys:
        places.setdefault((key.part, key.sizes), len(places))
    return lambda key: (places[key.part, key.sizes], key.path != REFERENCE)


def told_sizes(key: Key) -> str:
    return ", ".join(f"{name} {told(value)}" for name, value in json.loads(key.sizes).items())


def _line(key: Key, rows: dict[Key, Row]) -> str:
    row, found = rows[key], ratio(key, rows)
    faster = "–" if found is None else f"{1 / found.value:.2f}"
    thousandth = {name: _scaled(row.get(name), 1e3) for name in ("tflops", "tb_per_s")}
    return (
        f"| {key.part} | {told_sizes(key) or '–'} | {key.path or '–'} | {key.dtype or '–'} "
        f"| {figures(row['ms'])} | {figures(row['p10_ms'])}–{figures(row['p90_ms'])} "
        f"| {row['n']}×{row['calls_per_sample']} | {figures(row.get('images_per_s'))} "
        f"| {figures(thousandth['tflops'])} | {figures(thousandth['tb_per_s'])} "
        f"| {number(row.get('fraction_of_limit'), 2)} "
        f"| {figures(_scaled(row.get('peak_bytes'), 1e-6))} | {faster} |"
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def figures(value: float | None) -> str:
    """Three significant figures, without an exponent."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"
