"""Rows of the suites, read: who is whose twin, and how many times its time.

A row is told apart by (suite, part, path, dtype, sizes); a repeated one replaces the earlier. Its
twin has the same suite, part and sizes, and the path "reference". Ratios are of medians, and their
uncertainty follows from the spread of the samples, as if these were normal. Few samples may lie
close together by chance, so a row's spread counts as at least the median of its suite's in the run.
Twins lie up to minutes apart, in which load and clock drift. Where both were run in turn (field
``over_reference``), the ratio is the median of those of neighbours, and no drift is in it. Where
the reference was measured once more behind its twins (path "reference, again"), what its two times
differ by is part of every ratio's error. Elsewhere that drift is in no error.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from benchmarks.results import read_environment, read_rows, result_folders
from benchmarks.timing import quantile

Row = dict[str, Any]
REFERENCE = "reference"
AGAIN = "reference, again"
"""The path of a reference that is measured once more, behind its twins."""
KIND = "suite"
"""``kind`` of a row; "suites" is that of an environment."""
NESTED = "suites"
"""Folder of a run on a GPU that holds its run of the suites."""
COMMAND = "python -m pytest benchmarks/ --benchmark-only --record"


class Key(NamedTuple):
    suite: str
    part: str
    path: str
    dtype: str
    sizes: str

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {told(value)}" for name, value in json.loads(self.sizes).items())
        words = [self.suite, self.part, self.path, self.dtype, sizes]
        return " / ".join(word for word in words if word)


class Ratio(NamedTuple):
    """A time over its twin's; ``error`` is the relative standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        """With twice the standard error."""
        digits = 2 if self.value >= 0.1 else 4
        error = 2 * self.error * self.value
        return f"{self.value:.{digits}f} ± {f'{error:.{digits}f}' if math.isfinite(error) else '?'}"


def told(value: Any) -> str:
    """A size in a table."""
    return "×".join(map(str, value)) if isinstance(value, list) else str(value)


def key_of(row: Row) -> Key:
    sizes = json.dumps(row.get("sizes") or {}, sort_keys=True)
    return Key(row["suite"], row["part"], row["path"], row.get("dtype") or "", sizes)


def suite_rows(rows: Iterable[Row]) -> dict[Key, Row]:
    """The last row of each key, in the order in which the keys first came."""
    return {key_of(row): row for row in rows if row.get("kind") == KIND}


def twin(key: Key, rows: dict[Key, Row]) -> Row | None:
    """The measured reference of ``key``; of its dtype where there are several, else the first."""
    same = [
        (other, row)
        for other, row in rows.items()
        if (other.suite, other.part, other.sizes) == (key.suite, key.part, key.sizes)
        and other.path == REFERENCE
        and row["status"] == "ok"
    ]
    same.sort(key=lambda pair: pair[0].dtype != key.dtype)
    return same[0][1] if same else None


def spread(row: Row, rows: dict[Key, Row]) -> float:
    """Relative standard error of a row's median, in its run; infinite where nothing tells."""
    return _median_error(_times(row), [_times(other) for other in _measured(row["suite"], rows)])


def paired(row: Row, rows: dict[Key, Row]) -> Ratio | None:
    """Its time over the yardstick's, run in turn with it; None where they were not.

    The yardstick is a reference, of one dtype for all: it has no such field itself.
    """
    if (own := _ratios(row)) is None:
        return Ratio(1.0, 0.0) if row["path"] == REFERENCE else None
    others = [_ratios(other) for other in _measured(row["suite"], rows)]
    return Ratio(own.value, _median_error(own, [other for other in others if other is not None]))


class Samples(NamedTuple):
    """A median with its deciles."""

    value: float
    p10: float
    p90: float
    n: int

    @property
    def sigma(self) -> float:
        """Relative standard deviation of a sample, by the distance of p10 and p90."""
        return (self.p90 - self.p10) / _deciles_apart(self.n) / self.value


def _times(row: Row) -> Samples:
    return Samples(row["ms"], row["p10_ms"], row["p90_ms"], row["n"])


def _ratios(row: Row) -> Samples | None:
    found = row.get("over_reference")
    return None if found is None else Samples(**found)


def _measured(suite: str, rows: dict[Key, Row]) -> list[Row]:
    return [row for row in rows.values() if row["suite"] == suite and row["status"] == "ok"]


def _median_error(own: Samples, others: list[Samples]) -> float:
    """sqrt(pi / 2) sigma / sqrt(n), with the larger of its own sigma and the median of all."""
    known = [other.sigma for other in others if other.n > 1]
    typical = quantile(known, 0.5) if known else math.inf
    sigma = max(own.sigma, typical) if own.n > 1 else typical
    return math.sqrt(math.pi / 2 / own.n) * sigma


@functools.cache
def _deciles_apart(n: int) -> float:
    """Sigmas between p10 and p90 of n normal samples: 1.8 for 5 of them, 2.56 for many.

    By Blom's approximation of expected order statistics.
    """
    normal = NormalDist()
    ordered = [normal.inv_cdf((place - 0.375) / (n + 0.25)) for place in range(1, n + 1)]
    return quantile(ordered, 0.9) - quantile(ordered, 0.1)


def ratio(key: Key, rows: dict[Key, Row]) -> Ratio | None:
    """Time over the twin's; None for the twin itself, what wasn't measured, and what has none."""
    row, other = rows[key], twin(key, rows)
    if row["status"] != "ok" or other is None or other is row:
        return None
    return over(row, other, rows)


def over(row: Row, other: Row, rows: dict[Key, Row]) -> Ratio:
    """Two measured rows' times of one work, the first over the second, of one run."""
    one, two = paired(row, rows), paired(other, rows)
    if one is not None and two is not None:
        return Ratio(one.value / two.value, math.hypot(one.error, two.error))
    error = math.hypot(spread(row, rows), spread(other, rows), drift(row, rows))
    return Ratio(row["ms"] / other["ms"], error)


def drift(row: Row, rows: dict[Key, Row]) -> float:
    """What the same work differed by at two times, relative; 0 where nothing was repeated.

    Two times of one work differ by sqrt(2) of a time's own drift, and so do those of two works.
    """
    key = key_of(row)
    first, again = (rows.get(key._replace(path=path)) for path in (REFERENCE, AGAIN))
    if first is None or again is None or not first["status"] == again["status"] == "ok":
        return 0.0
    return abs(math.log(again["ms"] / first["ms"]))


class SuiteRun:
    """A recorded run of the suites; ``place`` is its folder within the results."""

    def __init__(self, folder: Path, place: str | None = None) -> None:
        self.folder = folder
        self.place = folder.name if place is None else place
        self.environment = read_environment(folder)
        self.rows = suite_rows(read_rows(folder))

    @property
    def machine(self) -> str:
        """What two runs must share to be compared."""
        about = self.environment
        device, threads = about["device"], about["threads"]
        cores = about["cpu"]["usable_cores"]
        return f"{device}, {cores:g} cores, {threads} thread{'' if threads == 1 else 's'}"

    @property
    def ended(self) -> bool:
        return bool(self.environment.get("ended"))

    @property
    def complete(self) -> bool:
        """All suites, to the end."""
        return self.ended and self.environment.get("whole", True)


def is_suite_run(folder: Path) -> bool:
    return read_environment(folder).get("kind") == "suites"


def suite_runs(results: Path) -> list[SuiteRun]:
    """All of them, the oldest first; those that belong to a run on a GPU lie inside its folder.

    Tiny sizes, which try the code, are no results.
    """
    found: list[SuiteRun] = []
    for folder in result_folders(results):
        for path in (folder, *result_folders(folder / NESTED)):
            if is_suite_run(path):
                found.append(SuiteRun(path, path.relative_to(results).as_posix()))
    return [run for run in found if not run.environment.get("tiny")]


def newest_by_machine(results: Path) -> list[SuiteRun]:
    """The last run of each machine; a part, or one cut short, only where there is no other."""
    newest: dict[str, SuiteRun] = {}
    for run in suite_runs(results):
        held = newest.get(run.machine)
        if held is None or (run.complete, run.ended) >= (held.complete, held.ended):
            newest[run.machine] = run
    return list(newest.values())
