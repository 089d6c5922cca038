"""Has anything become slower? A fresh run of the suites against the last recorded one.

    python -m benchmarks.regress [FRESH_FOLDER] [--against FOLDER] [--tolerance 0.15]

Compared is each row's time over its reference twin's of the same run, never seconds: what holds for
a whole run (another clock, a busy neighbour) meets both. Not alike, for they lie up to minutes
apart. Where they were run in turn there is no drift between them; where the reference was measured
once more behind its twins, its drift widens the errors (see `benchmarks.suite_rows`); elsewhere a
drift can look like a change. FRESH_FOLDER is the newest in benchmarks/results/ unless given; the
other is the last one before it there, whole, of the same CPU or GPU, cores and threads.

A ratio of two ratios counts as a regression where it is above 1 + tolerance by more than three
times its standard error, which follows from the spreads of the four medians in it, each at least
what is usual in its suite, from that drift, and from how the changes of all rows scatter: most
rows have not changed, so what they scatter by is what two runs on this machine differ by. (Two runs
of one source on a shared virtual machine scattered by a fifth, single rows by a factor of two.) So
a noisy machine can hide something: the table marks rows whose error alone reaches the tolerance. A
slower reference is not seen, and makes the others look better: it is the yardstick.

Exit code: 0; 1 where a row regressed, or failed that was measured before; 2 where nothing can be
compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, median

from benchmarks.results import ROOT
from benchmarks.suite_rows import (
    COMMAND,
    REFERENCE,
    Key,
    Ratio,
    SuiteRun,
    is_suite_run,
    ratio,
    suite_runs,
)

RESULTS = ROOT / "benchmarks" / "results"
ERRORS = 3.0
"""Standard errors beyond which a difference is no chance: of 740 rows one passes it on one side,
and some seventy are compared."""
LEAST_ROWS = 8
"""Changes from which their scatter says something."""


class NothingToCompare(ValueError):
    """Wrong folders, or none that fit together."""


@dataclass(frozen=True)
class Change:
    """Of one row: both ratios to the twin, and the verdict."""

    key: Key
    before: Ratio
    now: Ratio
    tolerance: float
    scatter: float = 0.0
    """By which rows of the two runs differ without a cause, relative."""

    @property
    def value(self) -> float:
        """How many times as long, both measured by their twins."""
        return self.now.value / self.before.value

    @property
    def error(self) -> float:
        """Relative."""
        return math.hypot(self.now.error, self.before.error, self.scatter)

    @property
    def verdict(self) -> str:
        beyond = abs(math.log(self.value)) - math.log1p(self.tolerance)
        if beyond > ERRORS * self.error:
            return "slower" if self.value > 1 else "faster"
        if beyond > 0:
            return "within noise"
        return "same, but noisy" if ERRORS * self.error >= self.tolerance else "same"


@dataclass(frozen=True)
class Comparison:
    """Of two runs; each key is in one place only."""

    changes: Sequence[Change]
    failed: Sequence[tuple[Key, str]]
    """Measured before, failed now, and why."""
    missing: Sequence[tuple[Key, str]]
    """Compared before, absent now: not run, skipped, or without its twin."""
    new: Sequence[Key]
    alone: Sequence[Key]
    """Measured in both, and no reference twin in either."""

    @property
    def regressed(self) -> bool:
        return bool(self.failed) or any(change.verdict == "slower" for change in self.changes)


def compare(fresh: SuiteRun, recorded: SuiteRun, tolerance: float) -> Comparison:
    """Every row of both.

    Raises:
        NothingToCompare: other machines, or not one row in both.
    """
    if fresh.machine != recorded.machine:
        raise NothingToCompare(
            f"{fresh.folder.name} ran on {fresh.machine}, {recorded.folder.name} on "
            f"{recorded.machine}: ratios of different machines say nothing of the code"
        )
    changes, failed, missing, alone = [], [], [], []
    for key, row in recorded.rows.items():
        if row["status"] != "ok":
            continue
        now = fresh.rows.get(key)
        if now is not None and now["status"] == "failed":
            failed.append((key, now["reason"]))
            continue
        before, after = ratio(key, recorded.rows), ratio(key, fresh.rows) if now else None
        if before is not None and after is not None:
            changes.append(Change(key, before, after, tolerance))
        elif now is None or now["status"] != "ok" or before is not None:
            missing.append((key, _why_missing(now)))
        elif key.path != REFERENCE:
            alone.append(key)
    new = [
        key for key, row in fresh.rows.items() if row["status"] == "ok" and not _was(key, recorded)
    ]
    if not changes and not failed:
        raise NothingToCompare(
            f"{fresh.folder.name} and {recorded.folder.name} have no row in common that was "
            "measured beside its reference twin in both"
        )
    scatter = scatter_of([change.value for change in changes])
    changes = [replace(change, scatter=scatter) for change in changes]
    return Comparison(changes, failed, missing, new, alone)


def scatter_of(values: Sequence[float]) -> float:
    """Relative standard deviation of factors, by the median distance from their median; 0 of few.

    A few that changed with a cause don't move it, and a change of all at once is no scatter.
    """
    if len(values) < LEAST_ROWS:
        return 0.0
    logs = [math.log(value) for value in values]
    middle = median(logs)
    return median(abs(log - middle) for log in logs) / NormalDist().inv_cdf(0.75)


def _was(key: Key, recorded: SuiteRun) -> bool:
    return key in recorded.rows and recorded.rows[key]["status"] == "ok"


def _why_missing(row: dict[str, object] | None) -> str:
    if row is None:
        return "not run"
    return "its reference twin wasn't measured" if row["status"] == "ok" else str(row["reason"])


def open_run(folder: Path) -> SuiteRun:
    if not is_suite_run(folder):
        raise NothingToCompare(
            f"{folder} holds no recorded run of the suites; `{COMMAND}` makes one"
        )
    return SuiteRun(folder)


def choose(fresh: Path | None, against: Path | None, results: Path) -> tuple[SuiteRun, SuiteRun]:
    """The two runs to compare.

    Raises:
        NothingToCompare: nothing is recorded, or nothing of that machine.
    """
    runs = suite_runs(results)
    if fresh is None and not runs:
        raise NothingToCompare(f"nothing is recorded in {results}; `{COMMAND}` does")
    first = runs[-1] if fresh is None else open_run(fresh)
    if against is not None:
        return first, open_run(against)
    same = [
        run
        for run in runs
        if run.folder.resolve() != first.folder.resolve()
        and run.machine == first.machine
        and run.folder.name < first.folder.name
        and run.complete
    ]
    if not same:
        raise NothingToCompare(
            f"no whole run before {first.folder.name} on {first.machine} is recorded in {results}; "
            "--against names another folder"
        )
    return first, same[-1]


def text(found: Comparison, fresh: SuiteRun, recorded: SuiteRun) -> str:
    """The table and the verdict."""
    lines = [
        f"{fresh.folder.name} against {recorded.folder.name}, {fresh.machine}",
        "Times over the reference twin's, ± twice the standard error.",
        "",
        f"{'before':>14} {'now':>14} {'now/before':>14}  verdict",
    ]
    for change in sorted(found.changes, key=lambda change: -change.value):
        times = Ratio(change.value, change.error)
        lines.append(
            f"{change.before!s:>14} {change.now!s:>14} {times!s:>14}  {change.verdict:<16}"
            f"{change.key}"
        )
    lines += [f"failed: {key}: {reason}" for key, reason in found.failed]
    lines += [f"missing: {key}: {reason}" for key, reason in found.missing]
    lines += [f"new: {key}" for key in found.new]
    lines += [f"has no reference twin: {key}" for key in found.alone]
    slower = sum(change.verdict == "slower" for change in found.changes)
    scatter = scatter_of([change.value for change in found.changes])
    scattered = f", which scatter by {100 * scatter:.0f} %" if scatter else ""
    lines.append(
        f"\n{len(found.changes)} compared{scattered}: {slower} slower; {len(found.failed)} failed, "
        f"{len(found.missing)} missing, {len(found.new)} new"
    )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.regress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("fresh", type=Path, nargs="?", metavar="FRESH_FOLDER")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="the run to compare with")
    parser.add_argument("--tolerance", type=float, default=0.15, metavar="SHARE")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if not 0 < options.tolerance < math.inf:
        parser.error(f"--tolerance must be a share above 0, got {options.tolerance}")
    try:
        fresh, recorded = choose(options.fresh, options.against, options.results)
        found = compare(fresh, recorded, options.tolerance)
    except (NothingToCompare, OSError, KeyError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text(found, fresh, recorded))
    return 1 if found.regressed else 0


if __name__ == "__main__":
    raise SystemExit(main())
