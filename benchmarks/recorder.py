"""A pytest plugin: every benchmark of a session becomes a row, on the disk when it is known.

    python -m pytest benchmarks/ --benchmark-only --record         a folder in benchmarks/results/
    python -m pytest benchmarks/ --benchmark-only --record=DIR     a folder in DIR

Without ``--record`` nothing is written. benchmarks/results/ takes whole runs only: the report shows
its newest folder of a machine, and the regression check compares with it, so a part of the suites
(-k, -m, some of the files) goes to a folder of one's own. Skipped and failed benchmarks are rows
too, with the reason. A run that stopped before its end keeps its rows, and says so.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import at_end, describe, load
from benchmarks.results import ROOT, ResultFolder
from benchmarks.steps.problem import TINY_VARIABLE
from benchmarks.suite_rows import KIND, Row, suite_rows
from benchmarks.suite_summary import summary
from benchmarks.timing import quantile

RESULTS = ROOT / "benchmarks" / "results"
LONGEST_REASON = 300
# Options by which a run is of some benchmarks only.
NARROWING = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "stepwise")
# In environment.json once for all rows.
SHARED = ("device", "threads", "versions", "commit")


def check_options(config: pytest.Config, out: Path) -> None:
    """Refuse what would record nothing, or a part where a whole run belongs."""
    if config.getoption("benchmark_disable") or config.getoption("collectonly"):
        raise pytest.UsageError("--record writes what is measured, and this run measures nothing")
    if out.is_file() or (out / "conftest.py").exists():
        raise pytest.UsageError(
            f"--record={out} isn't a folder for results: pytest's --record takes the word behind "
            "it; write --record=DIR, or --record as the last argument"
        )
    if out.resolve() == RESULTS and os.environ.get(TINY_VARIABLE):
        raise pytest.UsageError(
            f"{TINY_VARIABLE} is set: tiny sizes try the code, and their times are no results"
        )
    if out.resolve() == RESULTS and not is_whole(config):
        raise pytest.UsageError(
            "benchmarks/results/ takes whole runs only (pytest benchmarks/ --benchmark-only "
            "--record): give a part of the suites a folder of its own, --record=DIR"
        )


def is_whole(config: pytest.Config) -> bool:
    """Whether a session was asked for all suites."""
    if any(config.getoption(name, None) for name in NARROWING):
        return False
    return [Path(word).resolve() for word in config.args] == [ROOT / "benchmarks"]


class Recorder:
    """One session's folder, made when there is a first row."""

    def __init__(self, config: pytest.Config, out: Path) -> None:
        self._began_s = time.monotonic()
        self._out = out
        self._environment = {
            **describe(config.invocation_params.args),
            "whole": is_whole(config),
            "tiny": bool(os.environ.get(TINY_VARIABLE)),
        }
        self._rows: list[Row] = []

    @functools.cached_property
    def folder(self) -> ResultFolder:
        source = (self._environment["commit"] or self._environment["source_sha256"])[:10]
        made = ResultFolder.create(self._out, f"{self._environment['device']} {source}")
        made.write_environment(self._environment)
        return made

    def add(self, row: Row) -> None:
        passed_s = round(time.monotonic() - self._began_s, 2)
        row = {"kind": KIND, **row, "at_s": passed_s, "load": (load() or [None])[0]}
        self._rows.append(row)
        self.folder.add(row)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        is_benchmark = "benchmark" in getattr(item, "fixturenames", ())
        if is_benchmark and (
            report.when == "call" or (report.when == "setup" and report.outcome != "passed")
        ):
            fixture = getattr(item, "funcargs", {}).get("benchmark")
            self.add(row_of(item, report, fixture, why(report, call)))
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that can't be imported, or skips itself, is one row."""
        if report.outcome != "passed":
            about = {"suite": _suite_of(report.nodeid), "part": "all of it", "path": ""}
            status = "skipped" if report.outcome == "skipped" else "failed"
            self.add({**about, "status": status, "reason": why(report), "test": report.nodeid})

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        if not self._rows:
            return
        to_the_end = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        to_the_end = to_the_end and not (session.shouldfail or session.shouldstop)
        self._environment |= at_end()
        if not to_the_end:
            self._environment["ended"] = None
        self.folder.write_environment(self._environment)
        rows = suite_rows(self._rows)
        self.folder.write("summary.md", summary(self._environment, rows))
        self.folder.close()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        where = f" in {self.folder.path}" if self._rows else ""
        terminalreporter.write_line(f"{len(self._rows)} rows recorded{where}")


def row_of(item: pytest.Item, report: pytest.TestReport, fixture: Any, reason: str) -> Row:
    """What a benchmark said of itself, its times, or why there are none."""
    info = {} if fixture is None else dict(fixture.extra_info)
    params = getattr(getattr(item, "callspec", None), "params", {})
    row: Row = {
        "suite": _suite_of(item.nodeid),
        "part": getattr(item, "originalname", item.name).removeprefix("test_"),
        "path": str(params.get("path", params.get("form", ""))),
        "sizes": {
            name: str(value) for name, value in params.items() if name not in ("path", "form")
        },
        **{name: value for name, value in info.items() if name not in SHARED},
        "test": item.nodeid,
        "status": {"passed": "ok", "skipped": "skipped"}.get(report.outcome, "failed"),
    }
    if row["status"] != "ok":
        return row | {"reason": reason}
    if fixture is None or fixture.stats is None:
        return row | {"status": "failed", "reason": "it passed, and nothing was timed"}
    return row | times(fixture.stats)


def times(stats: Any) -> Row:
    """Of pytest-benchmark's samples: the median and its spread, in milliseconds of a call."""
    samples_ms = [1e3 * sample_s for sample_s in stats.stats.data]
    return {
        "ms": quantile(samples_ms, 0.5),
        "p10_ms": quantile(samples_ms, 0.1),
        "p90_ms": quantile(samples_ms, 0.9),
        "least_ms": min(samples_ms),
        "n": len(samples_ms),
        "calls_per_sample": stats.iterations,
        "clock": getattr(stats.options["timer"], "__name__", "unknown"),
    }


def why(report: Any, call: pytest.CallInfo[None] | None = None) -> str:
    """The reason of a skip, or the first line of what went wrong."""
    if report.outcome == "passed":
        return ""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")[:LONGEST_REASON]
    text = str(report.longrepr)
    if call is not None and call.excinfo is not None:
        text = call.excinfo.exconly()
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else "unknown")[:LONGEST_REASON]


def _suite_of(nodeid: str) -> str:
    """Of a benchmark that names none: its module."""
    return Path(nodeid.split("::")[0]).stem.removeprefix("test_").replace("_", " ")
