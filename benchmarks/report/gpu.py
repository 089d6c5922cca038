"""The report's part on operations of a GPU: targets, floors, every problem beside its peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.summary import number
from benchmarks.gpu.verdict import latest_timings, targets, verdicts
from benchmarks.operation import PASSES, Problem
from benchmarks.operations import OPERATIONS
from benchmarks.report.drawing import figure, save
from benchmarks.results import read_environment, read_rows, result_folders
from benchmarks.roofline import Ceiling

Row = dict[str, Any]

COMMAND = "PYTHONPATH=kernels:. python -m benchmarks.gpu"
NOT_MEASURED = f"not measured yet (`{COMMAND}`)"
# Rates at which the floors are shown, for want of a measurement or beside it.
SHEET = Ceiling(798.0, 3.0, "an H100 SXM's measured bf16 product and memory")


class Run:
    """A folder of results and what it says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = read_environment(folder)
        self.rows = read_rows(folder)
        self.gpu: str | None = self.environment.get("gpu")
        self.timings = latest_timings(self.rows)


def newest_by_gpu(results: Path) -> list[Run]:
    """Of runs on a GPU; folders sort by date, so the last of each counts."""
    runs: dict[str, Run] = {}
    for folder in result_folders(results):
        run = Run(folder)
        if not run.environment.get("dry_run") and run.gpu is not None:
            runs[run.gpu] = run
    return list(runs.values())


def parts(runs: Sequence[Run], plots: dict[str, list[str]], link: str) -> list[str]:
    """Of docs/performance.md."""
    found = [_floors()] if runs else [_floors(), _nothing_yet()]
    for run in runs:
        found += _of_run(run, plots.get(run.folder.name, []), f"{link}/{run.folder.name}")
    return found


def _floors() -> str:
    lines = [
        "## What the work takes at least",
        "",
        "Counted, not measured: FLOPs of the formulas' products, every tensor moved once by one "
        "perfect kernel.",
        f"The last column is at {SHEET.tflops:g} TFLOP/s and {SHEET.tb_per_s:g} TB/s.",
    ]
    for operation in OPERATIONS:
        lines += [
            "",
            f"### {operation.name}",
            "",
            f"{operation.about}.",
            "",
            "| problem | pass | sizes | GFLOP | MB | µs |",
            "|---|---|---|---|---|---|",
        ]
        for problem in operation.problems:
            for direction in problem.passes:
                work = problem.work(direction)
                lines.append(
                    f"| {problem.name} | {direction} | {problem.shape.describe()} "
                    f"| {work.flops / 1e9:.2f} | {work.bytes / 1e6:.1f} "
                    f"| {1e3 * SHEET.floor_ms(work):.1f} |"
                )
    return "\n".join(lines)


def _nothing_yet() -> str:
    lines = ["## Targets", "", "For one H100 SXM.", "", "| target | measured |", "|---|---|"]
    lines += [f"| {target.name} | {NOT_MEASURED} |" for target in targets()]
    lines.append(f"| every operation ahead of every peer that does its work | {NOT_MEASURED} |")
    return "\n".join(lines)


def _of_run(run: Run, plots: Sequence[str], link: str) -> list[str]:
    environment = run.environment
    packages = environment.get("packages", {})
    smi = environment.get("nvidia_smi") or {}
    head = [
        f"## {run.gpu}",
        "",
        f"[{run.folder.name}]({link}/summary.md), source "
        f"{environment.get('commit') or environment.get('source_sha256', '')[:12]}, torch "
        f"{packages.get('torch')}, Triton {packages.get('triton')}, driver "
        f"{smi.get('driver_version', 'unknown')}. Environment: [environment.json]"
        f"({link}/environment.json); every row, with spread and n: [rows.jsonl]"
        f"({link}/rows.jsonl).",
    ]
    judged = ["| target | verdict | measured | note |", "|---|---|---|---|"]
    for row in verdicts(run.rows, run.gpu):
        measured = NOT_MEASURED if row["status"] == "not measured" else row["measured"]
        judged.append(
            f"| {row['target']} | {row['status']} | {measured} | {row['reason'] or '–'} |"
        )
    parts = ["\n".join(head), "\n".join(judged)]
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    parts += [_problem_table(run, problem.name, link) for problem in all_problems()]
    return parts


def all_problems() -> list[Problem]:
    return [problem for operation in OPERATIONS for problem in operation.problems]


def _problem_table(run: Run, problem: str, link: str) -> str:
    title = f"### {problem}"
    chosen = [row for key, row in run.timings.items() if key[0] == problem]
    if not chosen:
        return f"{title}\n\n{NOT_MEASURED}"
    lines = [
        title,
        "",
        f"[rows.jsonl]({link}/rows.jsonl)",
        "",
        "| | pass | work | µs | p10–p90 | of the roofline | to the best peer |",
        "|---|---|---|---|---|---|---|",
    ]
    order = list(PASSES)
    for row in sorted(chosen, key=lambda row: (order.index(row["pass"]), row["ms"])):
        beside = " (beside slow peers)" if row["tier"] == "slow" and row["ours"] else ""
        lines.append(
            f"| {row['contestant']}{beside} | {row['pass']} | {row['work']} "
            f"| {1e3 * row['ms']:.1f} | {1e3 * row['p10_ms']:.1f}–{1e3 * row['p90_ms']:.1f} "
            f"| {number(row.get('fraction_of_roofline'), 2)} "
            f"| {number(row.get('ratio_to_best_peer'), 2)} |"
        )
    return "\n".join(lines)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def drawn(run: Run, docs: Path) -> list[str]:
    """Plots of a run that are there, relative to ``docs``."""
    paths = [Path("performance", run.folder.name, f"{slug(p.name)}.svg") for p in all_problems()]
    return [path.as_posix() for path in paths if (docs / path).is_file()]


def draw(run: Run, docs: Path) -> None:
    """An SVG a problem: microseconds of each contestant in each pass, and the floor."""
    for problem in all_problems():
        rows = [r for key, r in run.timings.items() if key[0] == problem.name]
        rows = [r for r in rows if r["tier"] == "quick" or not r["ours"]]
        if not rows:
            continue
        picture = figure()
        for place, direction in enumerate(problem.passes, start=1):
            axes = picture.add_subplot(1, len(problem.passes), place)
            chosen = sorted((r for r in rows if r["pass"] == direction), key=lambda r: -r["ms"])
            axes.barh(
                [row["contestant"] for row in chosen],
                [1e3 * row["ms"] for row in chosen],
                color=[
                    "#d62728" if row["ours"] else "#9aa5b1" if row["work"] == "same" else "#d5dbe1"
                    for row in chosen
                ],
            )
            floors = [row["roofline_ms"] for row in chosen if "roofline_ms" in row]
            if floors:
                axes.axvline(1e3 * floors[0], color="black", linewidth=1, linestyle="--")
            axes.set_title(direction)
            axes.set_xlabel("µs (dashed: least the work takes)")
            axes.tick_params(axis="y", labelsize=7)
        picture.suptitle(f"{problem.name}, {run.gpu}")
        save(picture, docs / "performance" / run.folder.name / f"{slug(problem.name)}.svg")
