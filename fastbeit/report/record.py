"""What a run folder holds, read for the report; every file but the metrics may be missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fastbeit.report.samples import SAMPLES_FILE, ReportSamples
from fastbeit.training.metrics import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class RunRecord:
    """The files of one run, parsed.

    Attributes:
        name: of the run folder.
        metrics: log lines, oldest first.
        config: config.json, {} when missing.
        summary: summary.json, {} while the run is not finished.
        samples: pictures, or None.
        bad_samples: lines of bad_samples.jsonl.
        problems: what could not be read, to be shown rather than hidden.
    """

    name: str
    metrics: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    samples: ReportSamples | None = None
    bad_samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def series(self, name: str) -> list[float | None]:
        """One metric over the log lines, None where it is not a number."""
        values = (line.get(name) for line in self.metrics)
        return [value if isinstance(value, (int, float)) else None for value in values]

    def last(self, name: str) -> float | None:
        """The latest known value of a metric."""
        return next((v for v in reversed(self.series(name)) if v is not None), None)

    def final(self, name: str) -> float | None:
        """The summary's value, which is a mean over the end of the run; else the latest logged."""
        value = self.summary.get(name)
        return value if isinstance(value, (int, float)) else self.last(name)

    def typical(self, name: str) -> float | None:
        """Median over the log lines, without the first one: it holds the start-up."""
        known = [v for v in self.series(name)[1:] or self.series(name) if v is not None]
        return median(known) if known else None


def read_run(run_dir: str | Path) -> RunRecord:
    """Reads a run folder.

    Raises:
        ValueError: no folder, or no metrics.jsonl in it.
    """
    run_dir = Path(run_dir)
    metrics_path = run_dir / METRICS_FILE
    if not metrics_path.is_file():
        raise ValueError(
            f"{run_dir} holds no {METRICS_FILE}: expected the run folder of a pre-training "
            "(python -m fastbeit.report RUN_DIR)"
        )
    problems: list[str] = []
    samples = None
    if (run_dir / SAMPLES_FILE).exists():
        try:
            samples = ReportSamples.load(run_dir / SAMPLES_FILE)
        except ValueError as error:
            problems.append(str(error))
    return RunRecord(
        name=run_dir.resolve().name,
        metrics=read_metrics(metrics_path),
        config=_read_object(run_dir / "config.json", problems),
        summary=_read_object(run_dir / "summary.json", problems),
        samples=samples,
        bad_samples=_read_lines(run_dir / "bad_samples.jsonl"),
        problems=problems,
    )


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path.name} can't be read: {error}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds a {type(content).__name__}, not an object")
        return {}
    return content


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects a line; torn lines (a killed rank's) are left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records
