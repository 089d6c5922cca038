"""The report on the suites: figures and findings from rows alone, each with its file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.report import suites
from benchmarks.report.suite_plots import PLOTS
from benchmarks.suite_rows import SuiteRun
from benchmarks.suite_summary import figures

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="plots need matplotlib"
)
ENVIRONMENT = {
    "kind": "suites",
    "device": "AMD EPYC",
    "cpu": {"name": "AMD EPYC", "usable_cores": 2.0},
    "threads": 2,
    "started": "2026-01-02T12:00:00+00:00",
    "ended": "2026-01-02T12:07:00+00:00",
    "command": ["python", "-m", "pytest"],
    "commit": "abc",
    "dirty": False,
    "python": "3.12",
    "packages": {"torch": "2.13.0", "timm": None},
    "load_at_start": [0.1, 0.1, 0.1],
    "ceilings": {"float32": {"tflops": 0.1, "tb_per_s": 0.02, "source": "measured"}},
}
PARTS = [
    {"phase": "tokenize", "part": "convolutions", "ms": 300.0, "share": 0.3},
    {"phase": "forward", "part": "linear layers", "ms": 200.0, "share": 0.2},
    {"phase": "backward", "part": "linear layers", "ms": 480.0, "share": 0.48},
    {"phase": "backward", "part": "copies", "ms": 20.0, "share": 0.02},
]


def row(suite: str, path: str, ms: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "suite",
        "suite": suite,
        "part": "optimizer step",
        "path": path,
        "dtype": "float32",
        "sizes": {"batch": 2},
        "status": "ok",
        "ms": ms,
        "p10_ms": 0.9 * ms,
        "p90_ms": 1.1 * ms,
        "n": 5,
        "calls_per_sample": 1,
        "clock": "perf_counter",
        "images_per_s": 2e3 / ms,
        **more,
    }


COUNTED = {"flops": 3e11, "bytes": 4e9, "tflops": 0.08, "tb_per_s": 0.001, "peak_bytes": 10**9}
ROWS = [
    row("levers", "reference", 4000.0, parts=PARTS),
    row("levers", "pruning", 3900.0),
    row("levers", "channels-last", 3000.0, parts=PARTS),
    row("levers", "kernels", 1.0, status="skipped", reason="no GPU | none"),
    row("step", "reference", 4000.0, **COUNTED),
    row("step", "fast", 3000.0, **COUNTED),
    row("step", "official style", 6000.0, **COUNTED),
    row("loader", "reference", 200.0, clock="process_time"),
    row("loader", "DALI, CPU", 100.0, clock="process_time"),
    *[
        row("batch sizes", path, ms, sizes={"batch": batch}, peak_bytes=batch * 10**6)
        for path, ms in (("reference", 50.0), ("fast", 40.0))
        for batch in (4, 16)
    ],
]


def made(results: Path, rows: list[dict[str, Any]], **environment: Any) -> Path:
    folder = results / "2026-01-02-cpu"
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | environment))
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A docs folder with the report on the rows above; its results lie beside it."""
    folder = tmp_path_factory.mktemp("report")
    made(folder / "results", ROWS)
    words = ["--results", str(folder / "results"), "--docs", str(folder / "docs")]
    assert report.main(words) == 0
    return folder / "docs"


@needs_matplotlib
def test_every_figure_and_table_names_its_file(written: Path) -> None:
    text = (written / "performance.md").read_text(encoding="utf-8")
    assert suites.NOT_MEASURED not in text
    file = "(../benchmarks/results/2026-01-02-cpu/rows.jsonl)"
    # The head, the findings, each figure, each suite's table.
    assert text.count(file) == 2 + len(PLOTS) + 4
    for plot in PLOTS:
        assert f"](performance/2026-01-02-cpu/{plot.name}.svg)" in text
        svg = (written / "performance" / "2026-01-02-cpu" / f"{plot.name}.svg").read_bytes()
        assert b"<svg" in svg
    # 3 of 4 seconds, 3 of 6; sigma is 0.2 / 1.813 of 5 samples, and an error both medians have.
    assert "| step: optimizer step float32 | batch 2 | fast | 3,000 | 0.75 ± 0.13 |" in text
    assert "official style 0.50 ± 0.09" in text
    assert "| loader: optimizer step float32 | batch 2 | DALI, CPU | 100 | 0.50 ± 0.09 |" in text
    assert "| levers: " not in text  # they have a figure of their own
    assert "- skipped: no GPU / none\n  - optimizer step, batch 2, kernels, float32\n" in text


@needs_matplotlib
def test_the_same_rows_give_the_same_files(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [plot for plot in PLOTS if plot.name in ("waterfall", "throughput")]
    monkeypatch.setattr(suites, "PLOTS", some)
    report.draw(written.parent / "results", tmp_path)
    drawn = sorted(tmp_path.rglob("*.svg"))
    assert len(drawn) == 2
    for path in drawn:
        assert path.read_bytes() == (written / path.relative_to(tmp_path)).read_bytes()


@pytest.mark.parametrize(
    ("suite", "lost"),
    [
        ("levers", {"waterfall", "step-time"}),
        ("loader", {"loader-and-step"}),
        ("step", {"roofline", "loader-and-step"}),
        ("batch sizes", {"throughput", "memory"}),
    ],
)
def test_a_figure_without_its_rows_is_not_measured_yet(
    tmp_path: Path, suite: str, lost: set[str]
) -> None:
    folder = made(tmp_path / "results", [r for r in ROWS if r["suite"] != suite])
    run = SuiteRun(folder)
    assert {plot.name for plot in PLOTS if not plot.can_draw(run)} == lost
    text = report.page(tmp_path / "results", tmp_path)
    for plot in PLOTS:
        missing = f"### {plot.title}\n\n{suites.NOT_MEASURED}" in text
        assert missing == (plot.name in lost)


def test_without_a_run_every_figure_is_not_measured_yet(tmp_path: Path) -> None:
    text = report.page(tmp_path, tmp_path)
    assert text.count(suites.NOT_MEASURED) == len(PLOTS)
    assert "performance/" not in text


def test_a_figure_that_was_not_drawn_is_not_shown(tmp_path: Path) -> None:
    made(tmp_path / "results", ROWS)
    text = report.page(tmp_path / "results", tmp_path / "docs")
    assert text.count("Not drawn: matplotlib was missing") == len(PLOTS) and ".svg" not in text


def test_a_busy_machine_is_told(tmp_path: Path) -> None:
    made(tmp_path / "quiet", ROWS)
    assert "other work was running" not in report.page(tmp_path / "quiet", tmp_path)
    made(tmp_path / "busy", ROWS, load_at_start=[1.2, 0.3, 0.1])
    assert "other work was running" in report.page(tmp_path / "busy", tmp_path)


def test_a_run_that_was_cut_short_says_so(tmp_path: Path) -> None:
    made(tmp_path, ROWS[:1], ended=None)
    assert "cut short" in report.page(tmp_path, tmp_path)


def test_the_newest_run_of_each_machine_is_shown(tmp_path: Path) -> None:
    made(tmp_path, ROWS)
    newer = made(tmp_path / "x", ROWS)
    newer.rename(tmp_path / "2026-01-03-cpu")
    other = made(tmp_path / "y", ROWS, threads=1)
    other.rename(tmp_path / "2026-01-01-cpu")
    text = report.page(tmp_path, tmp_path)
    assert "2026-01-02-cpu" not in text
    assert "2026-01-03-cpu" in text and "2026-01-01-cpu" in text


def test_a_run_inside_a_gpus_folder_is_linked_where_it_lies(tmp_path: Path) -> None:
    outer = made(tmp_path, [], kind="gpu")
    made(outer / "suites", ROWS)
    text = report.page(tmp_path, tmp_path / "docs")
    assert "(../benchmarks/results/2026-01-02-cpu/suites/2026-01-02-cpu/rows.jsonl)" in text


def test_figures_are_significant() -> None:
    shown = [figures(value) for value in (None, 0.1234, 1.234, 12.34, 1234.5)]
    assert shown == ["–", "0.123", "1.23", "12.3", "1,234"]


def test_kernels_by_name_stand_beside_others_and_a_repeated_reference_beside_none(
    tmp_path: Path,
) -> None:
    """Both medians have 6.2 % of error by their samples, and the reference drifted by 9.5 %."""
    rows = [
        row("step", "reference", 4000.0),
        row("step", "fast", 3000.0),
        row("step", "kernels", 2000.0),
        row("step", "timm, compiled", 5000.0),
        row("step", "reference, again", 4400.0),
        row("levers", "reference", 4000.0),
        row("levers", "pruning", 3900.0),
        row("levers", "reference, again", 4400.0),
    ]
    run = SuiteRun(made(tmp_path, rows))
    found = [line for line in suites._findings(run, "file").splitlines() if "| step: " in line]
    assert len(found) == 2
    assert "| fast | 3,000 | 0.75 ± 0.19 | timm, compiled 0.60 ± 0.16 |" in found[0]
    assert "| kernels | 2,000 | 0.50 ± 0.13 | timm, compiled 0.40 ± 0.10 |" in found[1]
    waterfall = next(plot for plot in PLOTS if plot.name == "waterfall")
    assert [key.path for key, _ in waterfall.rows(run)] == ["reference", "pruning"]
