"""The report's part on the suites: what was found, figures, one table a suite.

Every sentence and figure names the file it rests on; one whose rows are missing is "not measured
yet", with the command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.drawing import save
from benchmarks.report.suite_plots import PLOTS
from benchmarks.suite_rows import COMMAND, REFERENCE, Key, SuiteRun, over, ratio
from benchmarks.suite_summary import about, figures, table, told_sizes

NOT_MEASURED = f"not measured yet (`{COMMAND}`)"
OURS = ("fast", "kernels", "DALI", "shared")
"""How the paths begin that are ours and not the reference."""

TITLE = "### The fast path beside the others"
FINDINGS = """{title}

Its time over theirs, ± twice the standard error by the samples' spread; below 1 it is ahead. Whole
steps on a CPU run in turn with the reference step: their ratios are medians of those of neighbours.
Others are ratios of medians; where the reference was measured twice, what its time changed by is in
the error ({file}).

| work | sizes | path | ms | over the reference's | over others' |
|---|---|---|---|---|---|"""


def parts(runs: Sequence[SuiteRun], docs: Path, link: str) -> list[str]:
    """Of docs/performance.md."""
    found = ["# Suites"]
    if not runs:
        lines = ["| figure | |", "|---|---|"]
        lines += [f"| {plot.title} | {NOT_MEASURED} |" for plot in PLOTS]
        found += ["\n".join(lines)]
    for run in runs:
        found += _of_run(run, docs, f"{link}/{run.place}")
    return found


def _of_run(run: SuiteRun, docs: Path, link: str) -> list[str]:
    file = f"[rows.jsonl]({link}/rows.jsonl)"
    head = [
        f"## {run.machine}",
        "",
        f"[{run.folder.name}]({link}/summary.md); environment: [environment.json]"
        f"({link}/environment.json); every row: {file}.",
        "",
        *about(run.environment),
    ]
    if not run.ended:
        head += ["", "**The run was cut short**: what it had not come to is missing."]
    parts = ["\n".join(head), _findings(run, file), *_figures(run, docs, file)]
    for suite in dict.fromkeys(key.suite for key in run.rows):
        rows = {key: row for key, row in run.rows.items() if key.suite == suite}
        parts.append(f"### {suite}\n\n{file}\n\n{table(rows)}")
    return parts


def _findings(run: SuiteRun, file: str) -> str:
    """Our paths, each beside its twin and everybody else, work by work."""
    lines = []
    rows = {key: row for key, row in run.rows.items() if row["status"] == "ok"}
    for key, row in rows.items():
        if not key.path.startswith(OURS):
            continue
        others = [
            f"{_named(other, key)} {over(row, theirs, run.rows)}"
            for other, theirs in rows.items()
            if _same_work(key, other) and _is_other(other, key)
        ]
        lines.append(
            f"| {key.suite}: {key.part} {key.dtype} | {told_sizes(key) or '–'} | {key.path or '–'} "
            f"| {figures(row['ms'])} | {ratio(key, rows) or '–'} | {'; '.join(others) or '–'} |"
        )
    if not lines:
        return f"{TITLE}\n\n{NOT_MEASURED}"
    return "\n".join([FINDINGS.format(title=TITLE, file=file), *lines])


def _same_work(one: Key, other: Key) -> bool:
    return (one.suite, one.part, one.sizes) == (other.suite, other.part, other.sizes)


def _is_other(other: Key, key: Key) -> bool:
    """Somebody else in that dtype, or the reference in another: of its own there is a column."""
    if other.dtype != key.dtype:
        return other.path == REFERENCE
    return not other.path.startswith((*OURS, REFERENCE))


def _named(other: Key, key: Key) -> str:
    return other.path if other.dtype == key.dtype else f"{other.path} in {other.dtype}"


def _figures(run: SuiteRun, docs: Path, file: str) -> list[str]:
    found = []
    for plot in PLOTS:
        path = _path(run, plot.name)
        text = f"### {plot.title}\n\n{plot.about} "
        if not plot.can_draw(run):
            found.append(f"### {plot.title}\n\n{NOT_MEASURED}")
        elif (docs / path).is_file():
            found.append(f"{text}From {file}.\n\n![{plot.title}]({path.as_posix()})")
        else:
            found.append(f"{text}Not drawn: matplotlib was missing. The rows are in {file}.")
    return found


def _path(run: SuiteRun, name: str) -> Path:
    return Path("performance", run.folder.name, f"{name}.svg")


def draw(run: SuiteRun, docs: Path) -> None:
    """Every plot that the run has rows for."""
    for plot in PLOTS:
        if plot.can_draw(run):
            save(plot.draw(run), docs / _path(run, plot.name))
