"""Result folders are never overwritten, survive a killed run, and are what the report says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.gpu.kernels import copy_fractions
from benchmarks.gpu.summary import summary
from benchmarks.gpu.verdict import targets, verdicts
from benchmarks.operation import OURS
from benchmarks.operations.attention.cases import BASE as PACKED
from benchmarks.operations.attention.cases import BASE_SEPARATE, FLASH2
from benchmarks.report import gpu
from benchmarks.results import ResultFolder, read_rows, result_folders
from benchmarks.roofline import Ceiling

NOON = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)


def test_a_folder_is_never_used_twice(tmp_path: Path) -> None:
    first = ResultFolder.create(tmp_path, "NVIDIA H100 abc", NOON)
    first.add({"kind": "a"})
    second = ResultFolder.create(tmp_path, "NVIDIA H100 abc", NOON)
    second.add({"kind": "b"})
    assert first.path.name == "2026-01-02T120000Z-nvidia-h100-abc"
    assert second.path.name == "2026-01-02T120000Z-nvidia-h100-abc-2"
    assert read_rows(first.path) == [{"kind": "a"}]
    for folder in (first, second):
        folder.close()


def test_rows_hold_no_nan_and_no_private_folder(tmp_path: Path) -> None:
    folder = ResultFolder.create(tmp_path, "x", NOON)
    home = os.path.expanduser("~")
    folder.add({"ms": float("nan"), "reason": f"{home}/.triton: no space", "list": [float("inf")]})
    (folder.path / "workers.log").write_text(f"in {home}/x.py", encoding="utf-8")
    folder.close()
    assert read_rows(folder.path) == [{"ms": None, "reason": "~/.triton: no space", "list": [None]}]
    assert (folder.path / "workers.log").read_text() == "in ~/x.py"


def test_rows_survive_a_kill(tmp_path: Path, repo_root: Path) -> None:
    """A writer killed in the middle of a line leaves all lines before it."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from benchmarks.results import ResultFolder\n"
        "folder = ResultFolder.create(Path(sys.argv[1]), 'killed')\n"
        "folder.write_environment({'gpu': None})\n"
        "for number in range(3):\n    folder.add({'number': number})\n"
        'folder._rows.write(\'{"number": 3, "ha\')\nfolder._rows.flush()\n'
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    (folder,) = result_folders(tmp_path)
    assert read_rows(folder) == [{"number": number} for number in range(3)]


def timing(problem: str, direction: str, who: str, us: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "timing",
        "problem": problem,
        "pass": direction,
        "tier": "quick",
        "contestant": who,
        "ours": who == OURS,
        "work": "same",
        "status": "ok",
        "ms": us / 1e3,
        "p10_ms": us / 1e3,
        "p90_ms": us / 1e3,
        "n": 9,
        "calls_per_sample": 3,
        "host_ms": 0.01,
        "host_bound": False,
        "tflops": 1.0,
        "tb_per_s": 1.0,
        "fraction_of_roofline": 0.5,
        "roofline_ms": us / 2e3,
        "fraction_of_copy": 0.8,
        "ratio_to_best_peer": 0.25,
        **more,
    }


BASE, SEPARATE = PACKED.name, BASE_SEPARATE.name
ROWS = [
    {
        "kind": "correctness",
        "check": "error",
        "case": "c",
        "dtype": "bfloat16",
        "status": "pass",
        "worst_ratio": 1.25,
        "reason": "",
    },
    timing(BASE, "forward", OURS, 80.0),
    timing(BASE, "forward", "eager PyTorch", 320.0),
    timing(BASE, "backward", OURS, 210.0),
    timing(SEPARATE, "forward", OURS, 79.0),
    timing(SEPARATE, "forward", FLASH2, 90.0, work="no bias"),
    timing(BASE, "backward", "SDPA math", 200.0),
    {
        "kind": "timing",
        "problem": BASE,
        "contestant": "xformers",
        "status": "unavailable",
        "reason": "import xformers.ops: no module | none",
    },
]
ENVIRONMENT = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "dry_run": False,
    "command": ["python"],
    "commit": "abc",
    "packages": {"torch": "2.13.0"},
    "started": "2026-01-02",
    "nvidia_smi": {"power.draw": "90 W"},
    "source_sha256": "0" * 64,
    "python": "3.12",
}


def by_target(rows: list[dict[str, Any]], gpu: str | None) -> dict[str, dict[str, Any]]:
    return {row["target"]: row for row in verdicts(rows, gpu)}


def test_verdicts() -> None:
    found = by_target(ROWS, "NVIDIA H100 80GB HBM3")
    status = {target: row["status"] for target, row in found.items()}
    assert status["every check of correctness passes"] == "met"
    assert status["attention forward, 128 images: at most 85 µs"] == "met"
    assert status["attention forward, 128 images: goal of 75 µs"] == "missed"
    assert status["attention backward with dBias, 128 images: at most 250 µs"] == "met"
    assert status["attention backward with dBias, 128 images: goal of 200 µs"] == "missed"
    flash = "with a trained bias: faster than FlashAttention-2 without any"
    assert status[f"forward, {flash}"] == "met" and status[f"backward, {flash}"] == "not measured"
    assert status[f"{BASE}, forward: ahead of every peer"] == "met"
    assert status[f"{BASE}, backward: ahead of every peer"] == "missed"
    # A yardstick is no peer.
    assert f"{SEPARATE}, forward: ahead of every peer" not in status


NORM, HEAD = "BEiT-B, residual + LayerNorm", "BEiT-B, masked head's loss"
CHOICE = "tokenizer head, 9,600 rows"
OTHER_ROWS = [
    timing(NORM, "forward", OURS, 60.0, fraction_of_copy=0.86),
    timing(NORM, "backward", OURS, 110.0, fraction_of_copy=0.74),
    timing(HEAD, "both", OURS, 700.0),
    timing(CHOICE, "forward", OURS, 620.0),
    timing(CHOICE, "forward", "bare GEMM with its bias", 500.0, work="no argmax"),
    {
        "kind": "kernels",
        "problem": HEAD,
        "status": "ok",
        "us_per_call": {"loss_whole_rows": 120.0},
        "fraction_of_copy": {"loss_whole_rows": 0.87},
    },
]


def test_verdicts_of_bandwidth_of_a_kernel_and_of_a_yardstick() -> None:
    found = by_target(OTHER_ROWS, "NVIDIA H100 80GB HBM3")
    status = {target: row["status"] for target, row in found.items()}
    copy = "of the copy's bandwidth"
    assert status[f"residual + LayerNorm forward: 85 % {copy}"] == "met"
    assert status[f"residual + LayerNorm backward, reduction included: 75 % {copy}"] == "missed"
    loss = "masked head's loss, forward and backward, 128 images: at most 0.75 ms"
    assert status[loss] == "met"
    assert status[f"its cross-entropy pass: 85 % {copy}"] == "met"
    gemm = "linear_argmax, 9,600 rows: within 25 % of the bare GEMM"
    assert found[gemm]["measured"] == "620.0 µs of 625.0" and status[gemm] == "met"
    # Times are set for one GPU, shares and ratios are not.
    elsewhere = by_target(OTHER_ROWS, "NVIDIA A100")
    assert "set for H100" in elsewhere[loss]["reason"] and not elsewhere[gemm]["reason"]


def test_the_share_of_a_kernel_is_of_all_that_bear_its_name() -> None:
    times = {"loss_whole_rows": 60.0, "void loss_whole_rows_2": 40.0, "gemm": 1e3}
    ceiling = Ceiling(1.0, 4.0, "")
    found = copy_fractions(times, {"loss_whole_rows": 300_000_000, "absent": 1}, ceiling)
    assert found == {"loss_whole_rows": pytest.approx(0.75)}
    assert copy_fractions(times, {"loss_whole_rows": 1}, None) == {}


def test_verdicts_on_another_gpu_and_without() -> None:
    target = "attention forward, 128 images: at most 85 µs"
    assert "measured on NVIDIA H200" in by_target(ROWS, "NVIDIA H200")[target]["reason"]
    assert by_target(ROWS, None)[target]["status"] == "not measured"
    failing = [*ROWS, {**ROWS[0], "status": "fail", "reason": "dq"}]
    row = by_target(failing, "NVIDIA H100")["every check of correctness passes"]
    assert row["status"] == "missed" and "error of c in bfloat16" in row["reason"]
    assert by_target([], None)["every check of correctness passes"]["status"] == "not measured"


def test_summary_shows_rows_reasons_and_errors() -> None:
    text = summary(ENVIRONMENT, [*ROWS, *verdicts(ROWS, ENVIRONMENT["gpu"])])
    assert "1 pass" in text and "1.25 c bfloat16" in text
    assert "| fastbeit_kernels | same | 80.0 | 80.0–80.0 | 9×3 |" in text
    assert "xformers: unavailable: import xformers.ops: no module / none" in text


def folder_of(path: Path, environment: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    path.mkdir(parents=True)
    (path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "rows.jsonl").write_text(lines, encoding="utf-8")
    return path


def test_report_without_results_claims_nothing(tmp_path: Path) -> None:
    folder_of(tmp_path / "r" / "2026-dry", {**ENVIRONMENT, "gpu": None, "dry_run": True}, ROWS)
    assert gpu.newest_by_gpu(tmp_path / "r") == []
    text = report.page(tmp_path / "r", tmp_path)
    assert (
        text.count("not measured yet (`PYTHONPATH=kernels:. python -m benchmarks.gpu`)")
        == len(targets()) + 1
    )
    assert "rows.jsonl" not in text


def test_report_of_results(tmp_path: Path) -> None:
    results, docs = tmp_path / "r", tmp_path / "docs"
    folder_of(results / "2026-01-01-h100", ENVIRONMENT, [])
    folder_of(results / "2026-01-02-h100", ENVIRONMENT, ROWS)
    assert report.main(["--results", str(results), "--docs", str(docs)]) == 0
    text = (docs / "performance.md").read_text(encoding="utf-8")
    assert "2026-01-01-h100" not in text  # the newer one counts
    assert "| fastbeit_kernels | forward | same | 80.0 | 80.0–80.0 | 0.50 | 0.25 |" in text
    # Every table names its file; what was not measured says so.
    shown = text.count("](../benchmarks/results/2026-01-02-h100/rows.jsonl)")
    assert shown == 1 + 2
    untimed = len(gpu.all_problems()) - 2
    judged = {row["target"]: row["status"] for row in verdicts(ROWS, "NVIDIA H100")}
    unjudged = sum(status == "not measured" for status in judged.values())
    assert text.count(gpu.NOT_MEASURED) == untimed + unjudged
    plots = sorted((docs / "performance" / "2026-01-02-h100").iterdir())
    assert [plot.suffix for plot in plots] == [".svg", ".svg"]
    assert all(f"performance/2026-01-02-h100/{plot.name}" in text for plot in plots)
    assert "<svg" in plots[0].read_text(encoding="utf-8")


def test_the_page_in_the_tree_is_what_the_results_say(repo_root: Path) -> None:
    docs = repo_root / "docs"
    written = (docs / "performance.md").read_text(encoding="utf-8")
    page = report.page(repo_root / "benchmarks" / "results", docs)
    assert written == page, "run python -m benchmarks.report"


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--workers", "0"]])
def test_senseless_options_are_refused(words: list[str], capsys: Any) -> None:
    from benchmarks.gpu.__main__ import arguments

    with pytest.raises(SystemExit):
        arguments(words)
    assert "must be" in capsys.readouterr().err
