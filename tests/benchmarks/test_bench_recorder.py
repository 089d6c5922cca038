"""What of a session's benchmarks is recorded, where, and when it is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import machine, recorder, suite
from benchmarks.results import read_environment, read_rows, result_folders
from benchmarks.roofline import Ceiling, Work
from benchmarks.suite_rows import SuiteRun

SUITE = """
import time
import pytest
import torch
from benchmarks.roofline import Work
from benchmarks.suite import measure, missing

@pytest.mark.parametrize("path", ["reference", "fast", "wrong", "absent"])
def test_product(benchmark, path):
    if path == "absent":
        missing("it isn't installed")
    x = torch.randn(64, 64)
    def check():
        assert path != "wrong", "out is 1e-2 off"
    measure(benchmark, lambda: x @ x, suite="products", part="square", path=path, check=check,
            images=2, work=Work(2 * 64**3, 3 * 4 * 64**2), rounds=3, side=64)

@pytest.fixture
def broken():
    raise OSError("no such data: " + __file__)

def test_broken(benchmark, broken):
    benchmark(int)

def test_plain(benchmark):
    benchmark.pedantic(time.sleep, args=(0.001,), rounds=2)

def test_no_benchmark():
    pass
"""


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
    repo_root: Path,
) -> tuple[SuiteRun, str]:
    """A small session with everything that can befall a benchmark, and what it printed."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_made_up.py").write_text(SUITE, encoding="utf-8")
    (folder / "test_elsewhere.py").write_text(
        "import pytest\npytest.importorskip('no_such_peer', reason='no_such_peer is missing')\n",
        encoding="utf-8",
    )
    done = run_python(
        *(
            "-m",
            "pytest",
            "-p",
            "benchmarks.conftest",
            "--benchmark-only",
            "-p",
            "no:cacheprovider",
        ),
        f"--record={folder / 'out'}",
        folder,
        cwd=folder,
        env={"PYTHONPATH": f"{repo_root}:{repo_root / 'kernels'}", "OMP_NUM_THREADS": "1"},
        expect=1,
    )
    (path,) = result_folders(folder / "out")
    return SuiteRun(path), done.stdout


def by_path(run: SuiteRun) -> dict[str, dict[str, Any]]:
    return {key.path: row for key, row in run.rows.items() if key.suite == "products"}


def test_a_row_says_what_ran_how_fast_and_how_far_from_the_limit(
    recorded: tuple[SuiteRun, str],
) -> None:
    row = by_path(recorded[0])["fast"]
    assert (row["status"], row["part"], row["sizes"]) == ("ok", "square", {"side": 64})
    assert (
        row["n"] == suite.QUICK_ROUNDS
        and row["least_ms"] <= row["p10_ms"] <= row["ms"] <= row["p90_ms"]
    )
    assert row["images_per_s"] == pytest.approx(2e3 / row["ms"])
    assert row["tflops"] == pytest.approx(2 * 64**3 / row["ms"] / 1e9)
    limit = recorded[0].environment["ceilings"]["float32"]
    floor_ms = Ceiling(**limit).floor_ms(Work(2 * 64**3, 3 * 4 * 64**2))
    assert row["fraction_of_limit"] == pytest.approx(floor_ms / row["ms"])
    # Quick calls are repeated: 2 * 64^3 FLOP take microseconds, and a sample 20 ms.
    assert row["calls_per_sample"] > 10 and row["clock"] == "perf_counter"


def test_skips_failures_and_broken_fixtures_are_rows(recorded: tuple[SuiteRun, str]) -> None:
    run, printed = recorded
    rows = by_path(run)
    assert rows["wrong"]["status"] == "failed" and "1e-2 off" in rows["wrong"]["reason"]
    others = {(row["suite"], row["part"]): row for row in run.rows.values()}
    absent = next(row for row in run.rows.values() if row["path"] == "absent")
    assert (absent["status"], absent["reason"]) == ("skipped", "it isn't installed")
    assert "no such data" in others["made up", "broken"]["reason"]
    assert others["made up", "plain"]["ms"] >= 1
    assert others["elsewhere", "all of it"]["reason"] == "no_such_peer is missing"
    assert not any("no_benchmark" in row["test"] for row in run.rows.values())
    assert f"{len(read_rows(run.folder))} rows recorded" in printed


def test_a_run_says_where_it_ran_and_names_no_folder(recorded: tuple[SuiteRun, str]) -> None:
    run, _ = recorded
    about = run.environment
    assert about["kind"] == "suites" and run.ended and about["threads"] == 1
    assert about["cpu"]["usable_cores"] > 0
    assert torch.__version__.startswith(about["packages"]["torch"])  # which may lack its "+cu130"
    assert about["command"][:4] == ["python", "-m", "pytest", "-p"]
    assert {"load_at_start", "load_at_end", "dirty", "commit"} <= set(about)
    assert about["whole"] is False and about["tiny"] is False and not run.complete
    everything = "".join(path.read_text(encoding="utf-8") for path in run.folder.iterdir())
    assert str(run.folder.parents[1]) not in everything
    assert run.folder.name.endswith("-" + (about["commit"] or about["source_sha256"])[:10])


def test_the_summary_sets_rows_beside_their_twin(recorded: tuple[SuiteRun, str]) -> None:
    run, _ = recorded
    text = (run.folder / "summary.md").read_text(encoding="utf-8")
    rows = by_path(run)
    faster = rows["reference"]["ms"] / rows["fast"]["ms"]
    (line,) = [line for line in text.splitlines() if "| fast |" in line]
    assert line.endswith(f"| {faster:.2f} |")
    assert "- skipped: it isn't installed\n  - product, absent" in text


def config(words: list[str], **options: Any) -> Any:
    given: dict[str, Any] = {"benchmark_disable": False, "collectonly": False}
    return SimpleNamespace(args=words, getoption=(given | options).get)


@pytest.mark.parametrize(
    ("words", "options", "out", "refusal"),
    [
        (["benchmarks"], {}, "results", None),
        (["benchmarks"], {"keyword": "loader"}, "results", "whole runs only"),
        (["benchmarks"], {"deselect": ["benchmarks/test_plan.py"]}, "results", "whole runs only"),
        (["benchmarks/test_plan.py"], {}, "results", "whole runs only"),
        (["benchmarks/test_plan.py"], {"keyword": "loader"}, "elsewhere", None),
        (["benchmarks"], {"benchmark_disable": True}, "results", "measures nothing"),
        (["tests"], {}, "benchmarks", "isn't a folder for results"),
    ],
)
def test_results_take_whole_runs_only(
    words: list[str],
    options: dict[str, Any],
    out: str,
    refusal: str | None,
    repo_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(repo_root)
    places = {"results": recorder.RESULTS, "benchmarks": repo_root / "benchmarks"}
    where = places.get(out, tmp_path)
    if refusal is None:
        recorder.check_options(config(words, **options), where)
    else:
        with pytest.raises(pytest.UsageError, match=refusal):
            recorder.check_options(config(words, **options), where)


def test_tiny_sizes_are_no_results(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo_root)
    monkeypatch.setenv("FASTBEIT_BENCH_TINY", "1")
    recorder.check_options(config(["benchmarks"]), tmp_path)
    with pytest.raises(pytest.UsageError, match="no results"):
        recorder.check_options(config(["benchmarks"]), recorder.RESULTS)


def test_arguments_are_shared_without_places(repo_root: Path) -> None:
    shown = machine.shareable
    assert shown("--record=/data/somebody/out") == "--record=out"
    assert shown(f"{repo_root}/benchmarks/test_plan.py") == "benchmarks/test_plan.py"
    assert shown("-k") == "-k" and shown("--benchmark-only") == "--benchmark-only"


def test_a_killed_run_keeps_its_rows(tmp_path: Path) -> None:
    made = recorder.Recorder(nothing_asked(), tmp_path)
    made.add({"suite": "s", "part": "p", "path": "fast", "status": "skipped", "reason": "x"})
    run = SuiteRun(made.folder.path)
    assert not run.ended and [key.path for key in run.rows] == ["fast"]
    assert read_environment(made.folder.path)["started"]
    made.folder.close()


@pytest.mark.parametrize(
    ("code", "stopped", "ended"),
    [
        (pytest.ExitCode.OK, False, True),
        (pytest.ExitCode.TESTS_FAILED, False, True),
        (pytest.ExitCode.TESTS_FAILED, "stopping after 1 failures", False),
        (pytest.ExitCode.INTERRUPTED, False, False),
    ],
)
def test_only_a_run_to_the_end_has_ended(
    tmp_path: Path, code: pytest.ExitCode, stopped: str | bool, ended: bool
) -> None:
    made = recorder.Recorder(nothing_asked(), tmp_path)
    session = SimpleNamespace(shouldfail=stopped, shouldstop=False)
    made.pytest_sessionfinish(session, code)
    assert not list(tmp_path.iterdir())  # a session without a benchmark leaves nothing
    made.add({"suite": "s", "part": "p", "path": "fast", "status": "skipped", "reason": "x"})
    made.pytest_sessionfinish(session, code)
    assert SuiteRun(made.folder.path).ended == ended
    assert (made.folder.path / "summary.md").is_file()


def nothing_asked() -> Any:
    asked = SimpleNamespace(args=("benchmarks",))
    return SimpleNamespace(**vars(config(["benchmarks"])), invocation_params=asked)
