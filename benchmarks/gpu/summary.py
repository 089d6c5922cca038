"""summary.md of a run, from its rows."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.verdict import latest_timings
from benchmarks.operation import PASSES

Row = dict[str, Any]


def number(value: Any, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def summary(environment: Row, rows: list[Row]) -> str:
    return (
        "\n\n".join(
            [
                _head(environment),
                verdict_table(rows),
                correctness_text(rows),
                *timing_tables(rows),
                *_others(rows),
            ]
        )
        + "\n"
    )


def _head(environment: Row) -> str:
    packages = environment.get("packages", {})
    lines = [
        "# Results on " + (environment.get("gpu") or "no GPU: a dry run, its times mean nothing"),
        "",
        f"- started {environment.get('started')}, command `{' '.join(environment['command'])}`",
        f"- source {environment.get('commit') or 'not a checkout'}, "
        f"sha256 {str(environment.get('source_sha256'))[:12]}",
        f"- Python {environment.get('python')}, "
        + ", ".join(f"{name} {version}" for name, version in packages.items() if version),
    ]
    smi = environment.get("nvidia_smi") or {}
    if smi:
        lines.append("- " + ", ".join(f"{key} {value}" for key, value in smi.items()))
    ceiling = environment.get("ceilings")
    if ceiling:
        lines.append(
            f"- ceilings: {number(ceiling['tflops'])} TFLOP/s, {number(ceiling['tb_per_s'], 2)} "
            f"TB/s ({ceiling['source']})"
        )
    return "\n".join(lines)


def verdict_table(rows: list[Row]) -> str:
    verdicts = {row["target"]: row for row in rows if row["kind"] == "verdict"}
    if not verdicts:
        return "## Targets\n\nThe run ended before they were judged."
    lines = ["## Targets", "", "| target | verdict | measured | note |", "|---|---|---|---|"]
    for target, row in verdicts.items():
        lines.append(f"| {target} | {row['status']} | {row['measured']} | {row['reason']} |")
    return "\n".join(lines)


def correctness_text(rows: list[Row]) -> str:
    checks = [row for row in rows if row["kind"] in ("correctness", "sanitizer")]
    states = ("pass", "fail", "skipped", "unavailable", "not finished", "not run")
    counts = {state: sum(row["status"] == state for row in checks) for state in states}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    lines = ["## Correctness", "", told or "Nothing was checked."]
    worst = sorted(
        (
            row
            for row in checks
            if row.get("check") == "error" and row.get("worst_ratio") is not None
        ),
        key=lambda row: -row["worst_ratio"],
    )
    if worst:
        lines += [
            "",
            "Largest errors against float64, in multiples of plain PyTorch's (2 allowed): "
            + "; ".join(
                f"{row['worst_ratio']:.2f} {row['case']} {row['dtype']}" for row in worst[:5]
            ),
        ]
    for row in checks:
        if row["status"] not in ("pass", "skipped"):
            what = row.get("check") or row.get("tool")
            lines.append(
                f"- {row['status']}: {what}, {row['case']} {row.get('dtype', '')}: {row['reason']}"
            )
    return "\n".join(lines)


def timing_tables(rows: list[Row]) -> list[str]:
    """One table a problem, fastest first, then who did not take part and why."""
    timings = latest_timings(rows)
    absent: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == "timing" and row["status"] != "ok":
            absent.setdefault(row["problem"], {})[row["contestant"]] = row
    problems = dict.fromkeys([*(key[0] for key in timings), *absent])
    tables = []
    for problem in problems:
        lines = [f"## {problem}"]
        for direction in PASSES:
            chosen = [row for key, row in timings.items() if key[:2] == (problem, direction)]
            if chosen:
                lines += ["", *_timing_lines(direction, chosen)]
        for name, row in absent.get(problem, {}).items():
            told = row["reason"].replace("|", "/")
            lines.append(f"\n- {name}: {row['status']}: {told}")
        tables.append("\n".join(lines))
    return tables


def _timing_lines(direction: str, rows: list[Row]) -> list[str]:
    lines = [
        f"| {direction} | work | µs | p10–p90 | n | TFLOP/s | TB/s | of the roofline "
        "| to the best peer | host µs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["ms"]):
        name = row["contestant"] + (
            " (beside slow peers)" if row["tier"] == "slow" and row["ours"] else ""
        )
        mark = " (queue ran dry)" if row["host_bound"] else ""
        lines.append(
            f"| {name} | {row['work']} | {1e3 * row['ms']:.1f}{mark} "
            f"| {1e3 * row['p10_ms']:.1f}–{1e3 * row['p90_ms']:.1f} "
            f"| {row['n']}×{row['calls_per_sample']} | {row['tflops']:.1f} "
            f"| {row['tb_per_s']:.2f} | {number(row.get('fraction_of_roofline'), 2)} "
            f"| {number(row.get('ratio_to_best_peer'), 2)} | {1e3 * row['host_ms']:.0f} |"
        )
    return lines


def _others(rows: list[Row]) -> list[str]:
    parts = []
    profiled = [row for row in rows if row["kind"] == "kernels" and row["status"] == "ok"]
    if profiled:
        lines = ["## Kernels under the profiler, µs a call"]
        for row in profiled:
            shares = ", ".join(f"{name} {us:.1f}" for name, us in row["us_per_call"].items())
            reached = "".join(
                f"; {name}: {100 * fraction:.0f} % of the copy's bandwidth"
                for name, fraction in (row.get("fraction_of_copy") or {}).items()
            )
            lines.append(f"- {row['problem']}: {shares}{reached}")
        parts.append("\n".join(lines))
    left = [row for row in rows if row["kind"] in ("lost", "not run", "suites", "tuning")]
    if left:
        parts.append(
            "## Also\n\n"
            + "\n".join(f"- {row['kind']}: {row['task']}: {row['reason']}" for row in left)
        )
    return parts
