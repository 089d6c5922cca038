"""The regression check: by ratios to the twin, beyond the noise, on the same machine, or not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import regress
from benchmarks.suite_rows import (
    Key,
    Ratio,
    SuiteRun,
    newest_by_machine,
    ratio,
    spread,
    suite_rows,
)

ENVIRONMENT = {
    "kind": "suites",
    "device": "AMD EPYC",
    "cpu": {"usable_cores": 2.0},
    "threads": 2,
    "ended": "2026-01-02",
}


def row(part: str, path: str, ms: float, noise: float = 0.01, **more: Any) -> dict[str, Any]:
    return {
        "kind": "suite",
        "suite": "model",
        "part": part,
        "path": path,
        "dtype": "float32",
        "sizes": {"batch": 2},
        "status": "ok",
        "ms": ms,
        "p10_ms": ms * (1 - noise),
        "p90_ms": ms * (1 + noise),
        "n": 5,
        **more,
    }


def made(results: Path, name: str, rows: list[dict[str, Any]], **environment: Any) -> Path:
    folder = results / name
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | environment))
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


BEFORE = [
    row("forward", "reference", 200.0),
    row("forward", "fast", 100.0),
    row("step", "reference", 400.0),
    row("step", "fast", 300.0),
]


def check(results: Path, *words: str) -> int:
    return regress.main(["--results", str(results), *words])


def test_a_slower_machine_is_no_regression_and_a_slower_path_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, "2026-01-01", BEFORE)
    # Everything takes three times as long: the ratios stay.
    made(tmp_path, "2026-01-02", [{**r, **times(r, 3.0)} for r in BEFORE])
    assert check(tmp_path) == 0
    assert "0 slower" in capsys.readouterr().out
    slower = [r if r["path"] == "reference" else {**r, **times(r, 1.3)} for r in BEFORE]
    made(tmp_path, "2026-01-03", slower)
    assert check(tmp_path) == 1
    out = capsys.readouterr().out
    # Against the last recorded, and each row is named.
    assert "2026-01-03 against 2026-01-02" in out and "2 slower" in out
    assert "model / forward / fast / float32 / batch 2" in out
    assert check(tmp_path, "--tolerance", "0.4") == 0


def times(r: dict[str, Any], factor: float) -> dict[str, float]:
    return {name: factor * r[name] for name in ("ms", "p10_ms", "p90_ms")}


def test_a_faster_path_is_told_and_no_regression(tmp_path: Path, capsys: Any) -> None:
    made(tmp_path, "2026-01-01", BEFORE)
    made(tmp_path, "2026-01-02", [BEFORE[0], row("forward", "fast", 50.0), *BEFORE[2:]])
    assert check(tmp_path) == 0
    assert "faster" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("factor", "noise", "verdict"),
    [
        (1.0, 0.01, "same"),
        (1.10, 0.01, "same"),
        (1.25, 0.01, "slower"),
        (1.25, 0.10, "within noise"),
        (2.00, 0.10, "slower"),
        (1.0, 0.10, "same, but noisy"),
        (0.70, 0.01, "faster"),
        (0.70, 0.30, "within noise"),
    ],
)
def test_noise_decides_what_counts(
    tmp_path: Path, factor: float, noise: float, verdict: str
) -> None:
    old = made(tmp_path, "a", [row("f", "reference", 100, noise), row("f", "fast", 50, noise)])
    fresh = [row("f", "reference", 100, noise), row("f", "fast", 50 * factor, noise)]
    new = made(tmp_path, "b", fresh)
    (change,) = regress.compare(SuiteRun(new), SuiteRun(old), 0.15).changes
    assert change.value == pytest.approx(factor) and change.verdict == verdict


def test_what_was_measured_once_is_never_a_regression(tmp_path: Path) -> None:
    once = [row("f", "reference", 100, n=1), row("f", "fast", 50, n=1)]
    old, new = made(tmp_path, "a", once), made(tmp_path, "b", [once[0], row("f", "fast", 90, n=1)])
    found = regress.compare(SuiteRun(new), SuiteRun(old), 0.15)
    assert not found.regressed and found.changes[0].verdict == "within noise"
    assert "1.80 ± ?" in regress.text(found, SuiteRun(new), SuiteRun(old))


def test_scatter_of_all_rows_is_no_news_of_one() -> None:
    quiet = [0.99, 1.0, 1.01, 1.0, 0.98, 1.02, 1.0, 1.0, 1.01]
    assert regress.scatter_of([*quiet, 1.5]) == pytest.approx(0.0148, rel=0.02)
    # A change of all at once is no scatter, and few rows tell nothing.
    assert regress.scatter_of([1.4 * value for value in quiet]) < 0.02
    assert regress.scatter_of([0.5, 1.0, 2.0]) == 0.0
    key = Key("step", "optimizer step", "fast", "float32", "{}")
    before, now = Ratio(1.0, 0.01), Ratio(1.5, 0.01)
    assert regress.Change(key, before, now, 0.15, scatter=0.015).verdict == "slower"
    assert regress.Change(key, before, now, 0.15, scatter=0.2).verdict == "within noise"


def test_the_error_is_that_of_a_median() -> None:
    """Of 101 normal samples: sqrt(pi / 2) sigma / sqrt(n), and p90 - p10 is 2.56 sigma."""
    sigma = 0.1
    many = row("f", "fast", 1.0, n=101, noise=1.2816 * sigma)
    expected = math.sqrt(math.pi / 2) * sigma / math.sqrt(101)
    assert spread(many, suite_rows([many])) == pytest.approx(expected, rel=0.03)
    # Few samples spread less than the distribution they are from; that is made up for.
    few = row("f", "fast", 1.0, n=5, noise=0.9 * sigma)
    expected = math.sqrt(math.pi / 2 / 5) * sigma
    assert spread(few, suite_rows([few])) == pytest.approx(expected, rel=0.03)


def test_samples_that_happen_to_agree_are_no_surer_than_their_suite() -> None:
    quiet, usual, loud = (
        row(part, "fast", 1.0, noise) for part, noise in (("a", 0.0), ("b", 0.1), ("c", 0.3))
    )
    rows = suite_rows([quiet, usual, loud, row("d", "fast", 1.0, 9.0, suite="other")])
    assert spread(quiet, rows) == spread(usual, rows) < spread(loud, rows)
    # Of one sample the suite tells; with nothing else of the suite, nobody does.
    once = row("e", "fast", 1.0, 0.0, n=1)
    assert spread(once, rows) == pytest.approx(math.sqrt(5) * spread(usual, rows))
    assert spread(once, suite_rows([once])) == math.inf


def test_missing_failed_new_and_twinless_rows_are_named(tmp_path: Path, capsys: Any) -> None:
    before = [
        *BEFORE,
        row("tokens", "reference", 10.0),
        row("tokens", "fast", 8.0),
        row("save", "stall", 5.0),
        row("gone", "reference", 5.0),
        row("was skipped", "timm", 1.0, status="skipped", reason="no timm"),
    ]
    now = [
        *BEFORE[:3],
        row("step", "fast", 1.0, status="failed", reason="loss is off"),
        row("tokens", "reference", 1.0, status="skipped", reason="no memory"),
        row("tokens", "fast", 8.0),
        row("save", "stall", 5.0),
        row("was skipped", "timm", 1.0),
    ]
    made(tmp_path, "2026-01-01", before)
    made(tmp_path, "2026-01-02", now)
    assert check(tmp_path) == 1  # what failed counts
    out = capsys.readouterr().out
    assert "failed: model / step / fast / float32 / batch 2: loss is off" in out
    assert "missing: model / tokens / reference / float32 / batch 2: no memory" in out
    assert "missing: model / tokens / fast / float32 / batch 2: its reference twin" in out
    assert "missing: model / gone / reference / float32 / batch 2: not run" in out
    assert "new: model / was skipped / timm" in out
    assert "has no reference twin: model / save / stall" in out
    assert "1 compared: 0 slower; 1 failed, 3 missing, 1 new" in out


def test_the_twin_of_the_same_dtype_counts(tmp_path: Path) -> None:
    rows = [
        row("f", "reference", 100.0),
        row("f", "fast", 20.0, dtype="bfloat16"),
        row("f", "reference", 40.0, dtype="bfloat16"),
        row("g", "reference", 100.0),
        row("g", "fast", 20.0, dtype="bfloat16"),
    ]
    run = SuiteRun(made(tmp_path, "a", rows))
    found = {key.part: ratio(key, run.rows) for key in run.rows if key.path == "fast"}
    assert found["f"] is not None and found["f"].value == pytest.approx(0.5)
    assert found["g"] is not None and found["g"].value == pytest.approx(0.2)
    assert all(ratio(key, run.rows) is None for key in run.rows if key.path == "reference")


def test_only_the_same_machine_is_compared(tmp_path: Path, capsys: Any) -> None:
    made(tmp_path, "2026-01-01", BEFORE)
    cut = made(tmp_path, "2026-01-02", BEFORE, ended=None)
    gpu = made(tmp_path, "2026-01-03", BEFORE, device="NVIDIA H100")
    fresh = made(tmp_path, "2026-01-04", BEFORE)
    assert check(tmp_path) == 0
    # Neither another machine's nor one that was cut short.
    assert "2026-01-04 against 2026-01-01" in capsys.readouterr().out
    assert check(tmp_path, str(fresh), "--against", str(gpu)) == 2
    assert "different machines" in capsys.readouterr().err
    assert check(tmp_path, str(gpu)) == 2
    assert "no whole run before" in capsys.readouterr().err
    assert check(tmp_path, str(fresh), "--against", str(cut)) == 0  # by name, anything goes
    newest = {run.machine: run.folder.name for run in newest_by_machine(tmp_path)}
    assert newest == {
        "AMD EPYC, 2 cores, 2 threads": "2026-01-04",
        "NVIDIA H100, 2 cores, 2 threads": "2026-01-03",
    }


def test_parts_inside_a_gpus_run_step_behind_whole_runs(tmp_path: Path, capsys: Any) -> None:
    made(tmp_path, "2026-01-01", BEFORE)
    outer = made(tmp_path, "2026-01-02", [], kind="gpu")
    made(outer / "suites", "2026-01-02T1", BEFORE[:2], whole=False)
    made(tmp_path, "2026-01-03", BEFORE, tiny=True)
    (newest,) = newest_by_machine(tmp_path)
    assert newest.place == "2026-01-01"
    made(outer / "suites", "2026-01-02T2", BEFORE[:2], whole=False, device="NVIDIA H100")
    places = {run.place for run in newest_by_machine(tmp_path)}
    assert places == {"2026-01-01", "2026-01-02/suites/2026-01-02T2"}
    fresh = made(tmp_path, "2026-01-04", BEFORE)
    assert check(tmp_path, str(fresh)) == 0
    assert "against 2026-01-01," in capsys.readouterr().out


def test_a_fresh_run_from_elsewhere_is_compared_with_the_recorded(tmp_path: Path) -> None:
    made(tmp_path / "results", "2026-01-01", BEFORE)
    fresh = made(tmp_path / "tmp", "2026-01-02", BEFORE)
    assert check(tmp_path / "results", str(fresh)) == 0


def test_nothing_to_compare_is_said(tmp_path: Path, capsys: Any) -> None:
    assert check(tmp_path) == 2
    assert "nothing is recorded" in capsys.readouterr().err
    assert check(tmp_path, str(tmp_path)) == 2
    assert "holds no recorded run" in capsys.readouterr().err
    old = made(tmp_path, "2026-01-01", BEFORE)
    other = made(tmp_path, "2026-01-02", [row("another", "fast", 1.0)])
    assert check(tmp_path, str(other), "--against", str(old)) == 2
    assert "no row in common" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        check(tmp_path, "--tolerance", "0")
