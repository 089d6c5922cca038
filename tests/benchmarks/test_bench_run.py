"""The whole command: a dry run end to end, workers that crash or hang, the plan, no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import plan, sanitizer
from benchmarks.gpu.pool import Pool, Task
from benchmarks.operation import OURS, PASSES
from benchmarks.operations import OPERATIONS, problem_by_name
from benchmarks.operations.attention.cases import FLASH2
from benchmarks.results import read_environment, read_rows, result_folders
from benchmarks.suite_rows import NESTED, SuiteRun

RunPython = Callable[..., subprocess.CompletedProcess[str]]


def test_dry_run_from_end_to_end(run_python: RunPython, tmp_path: Path, repo_root: Path) -> None:
    done = run_python(
        "-m", "benchmarks.gpu", "--dry-run", "--minutes", "4", "--out", tmp_path,
        "--only", "expand 5 x 7", "--only", "LayerNorm of BEiT-B", "--only", "residual alone",
        "--only", "rows selected", "--only", "argmax of one row", "--only", "patches, small",
        "--only", "convolution of one pixel", "--only", "GELU of one row",
        "--only", "training curve", "--only", "replayed step", "--only", "test_tokenizer.py",
        env={"PYTHONPATH": str(repo_root)}, timeout_s=240,
    )  # fmt: skip
    (folder,) = result_folders(tmp_path)
    environment, rows = read_environment(folder), read_rows(folder)
    assert environment["dry_run"] and environment["ceilings"]["tflops"] > 0
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert str(tmp_path) not in json.dumps(environment)
    kinds = {row["kind"] for row in rows}
    assert kinds == {
        "correctness", "prepared", "timing", "kernels", "suites", "tuning", "verdict",
    }  # fmt: skip
    nested = SuiteRun(*result_folders(folder / NESTED))
    assert nested.ended and {key.suite for key in nested.rows} == {"tokenizer"}
    assert any(row["status"] == "ok" for row in nested.rows.values())
    checks = {row["check"] for row in rows if row["kind"] == "correctness"}
    assert {
        "error",
        "repeatable",
        "writes everything",
        "batch independent",
        "reads nothing else",
        "torch.compile",
        "CUDA graph",
        "checkpointing",
        "autocast",
        "training curve",
        "replayed step: tokens ahead",
    } <= checks
    bad = [row for row in rows if row.get("status") in ("fail", "failed", "wrong")]
    assert not bad, bad
    timed = [row for row in rows if row["kind"] == "timing" and row["status"] == "ok"]
    assert {row["pass"] for row in timed if row["ours"]} == set(PASSES)
    checked = {row["case"] for row in rows if row["kind"] == "correctness"}
    for operation in OPERATIONS:
        assert checked & {case.name for case in operation.cases}, operation.name
    assert {row["tier"] for row in timed} == {"quick", "slow"}
    names = {row["contestant"] for row in timed}
    assert {"torch.compile max-autotune", "eager PyTorch", OURS} <= names
    absent = [row for row in rows if row["kind"] == "timing" and row["status"] == "unavailable"]
    assert absent and all(row["reason"] for row in absent)
    assert "a dry run" in (folder / "summary.md").read_text(encoding="utf-8")
    assert "## Targets" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(run_python: RunPython, tmp_path: Path, repo_root: Path) -> None:
    done = run_python(
        "-m", "benchmarks.gpu", "--out", tmp_path, env={"PYTHONPATH": str(repo_root)}, expect=2
    )
    assert "needs an NVIDIA GPU" in done.stderr and "--dry-run" in done.stderr
    assert not list(tmp_path.iterdir())


# A worker that does what the task's name says.
STAND_IN = """
import json, os, sys, time
pipe = int(sys.argv[1])
def send(**event):
    os.write(pipe, (json.dumps(event) + "\\n").encode())
for line in sys.stdin:
    task = json.loads(line)
    send(event="step", step="step of " + task["do"])
    if task["do"] == "crash":
        os.abort()
    if task["do"] == "hang":
        time.sleep(100)
    if task["do"] == "fatal":
        send(event="fatal", reason="the context is lost")
        sys.exit(3)
    send(event="row", row={"kind": "did", "do": task["do"], "pid": os.getpid()})
    send(event="done")
    if task["do"] == "leave":
        sys.exit(0)
"""


def run_pool(
    tmp_path: Path,
    names: list[str],
    *,
    workers: int = 1,
    seconds: float = 30.0,
    retry: bool = False,
    shares: dict[str, float] | None = None,
) -> tuple[list[dict[str, Any]], list[tuple[str, str, str]], list[Task]]:
    rows: list[dict[str, Any]] = []
    lost: list[tuple[str, str, str]] = []

    def on_lost(task: Task, step: str, reason: str) -> Task | None:
        lost.append((task.name, step, reason))
        return Task("instead", {"do": "instead"}) if retry else None

    pool = Pool(
        workers,
        tmp_path / "log",
        rows.append,
        on_lost,
        command=(sys.executable, "-S", "-c", STAND_IN),
        shares=shares or {},
    )
    tasks = [
        Task(name, {"do": name}, silence_s=1.0 if name == "hang" else 20.0, group=name[0])
        for name in names
    ]
    left = pool.run(tasks, time.monotonic() + seconds)
    return rows, lost, left


def test_a_crash_costs_one_task(tmp_path: Path) -> None:
    rows, lost, left = run_pool(tmp_path, ["a", "crash", "b", "fatal", "c", "leave", "d"])
    assert [row["do"] for row in rows] == ["a", "b", "c", "leave", "d"]
    assert [name for name, *_ in lost] == ["crash", "fatal"] and not left
    assert lost[0][1] == "step of crash" and "SIGABRT" in lost[0][2]
    assert lost[1][2] == "the context is lost"


def test_a_hang_is_ended_and_another_try_is_made(tmp_path: Path) -> None:
    rows, lost, left = run_pool(tmp_path, ["hang", "b"], retry=True)
    assert [row["do"] for row in rows] == ["instead", "b"] and not left
    assert "nothing came" in lost[0][2]


def test_tasks_are_spread_over_workers(tmp_path: Path) -> None:
    rows, _, _ = run_pool(tmp_path, [f"t{i}" for i in range(40)], workers=2)
    assert len(rows) == 40 and len({row["pid"] for row in rows}) == 2


def test_time_is_up(tmp_path: Path) -> None:
    began = time.monotonic()
    tasks = ["a", "hang", "b"]
    rows, _, left = run_pool(tmp_path, tasks, seconds=0.7)
    assert time.monotonic() - began < 5
    assert [task.name for task in left] == tasks[len(rows) :]


def test_a_worker_that_cannot_start_is_reported(tmp_path: Path) -> None:
    lost: list[str] = []
    pool = Pool(
        1,
        tmp_path / "log",
        lambda row: None,
        lambda task, step, reason: lost.append(reason),
        command=(sys.executable, "-c", "import nothing_of_that_name"),
    )
    assert pool.run([Task("a", {})], time.monotonic() + 20) == []
    assert lost == ["the process ended with exit code 1"]
    assert "nothing_of_that_name" in (tmp_path / "log").read_text()


def test_a_group_that_used_its_share_waits_for_the_others(tmp_path: Path) -> None:
    names = ["a1", "a2", "b1", "a3", "b2"]
    rows, lost, left = run_pool(tmp_path, names, shares={"a": 1e-9})
    assert [row["do"] for row in rows] == ["a1", "b1", "b2", "a2", "a3"]
    assert not lost and not left


def test_the_most_important_comes_first() -> None:
    checks = plan.correctness_tasks(False, [])
    dtypes = [task.payload["dtype"] for task in checks if task.payload["kind"] == "correctness"]
    kinds = [task.payload["kind"] for task in checks]
    steps = kinds.index("correctness")  # the long ones begin at once, and end with the others
    assert sorted(set(kinds[:steps])) == ["curve", "replay"] and "curve" not in kinds[steps:]
    checks = checks[steps:]
    assert checks[0].payload["case"] == "BEiT at 224 pixels" and dtypes[0] == "bfloat16"
    assert dtypes.index("float16") > 10
    assert {"bfloat16", "float16", "float32"} == set(dtypes)
    assert len({task.name for task in checks}) == len(checks)
    timings = plan.timing_tasks(False, [], None)
    everybody = [op.name for op in OPERATIONS]
    leading = [op.name for op in OPERATIONS if any(p.worth == 0 for p in op.problems)]
    for tasks, names in ((checks, everybody), (timings, leading)):
        assert [task.group for task in tasks[: len(names)]] == names
    all_problems = [problem for op in OPERATIONS for problem in op.problems]
    assert len(timings) == 2 * len(all_problems)
    first = sum(problem.worth == 0 for problem in all_problems)
    second = first + sum(problem.worth == 1 for problem in all_problems)
    slow = [task.payload["slow"] for task in timings]
    assert slow[: second + first] == [False] * second + [True] * first
    most = plan.most_important(timings)
    assert [task.payload["slow"] for task in most] == [False] * first
    assert {problem_by_name(task.payload["problem"])[1].worth for task in most} == {0}
    named = {target.problem for op in OPERATIONS for target in op.targets}
    assert named <= {problem.name for problem in all_problems if problem.worth == 0}


def test_no_operation_takes_all_the_time() -> None:
    """Shares make one; a run's first part, measured at its limits, fits into what is left of nine
    minutes after correctness has taken all that it may, and so does each share."""
    assert sum(op.share for op in OPERATIONS) == pytest.approx(1.0)
    shares = plan.timing_shares(300.0)
    first = [
        task
        for task in plan.timing_tasks(False, [], None)
        if task.payload["limits"] == plan.LIMITS[0]
    ]
    assert plan.measuring_s(first) <= 0.45 * 300.0
    for operation in OPERATIONS:
        quick = [t for t in first if t.group == operation.name and not t.payload["slow"]]
        assert plan.measuring_s(quick) <= 0.5 * shares[operation.name]


def test_a_lost_contestant_is_left_out_of_the_next_try() -> None:
    rows: list[dict[str, Any]] = []
    lost = plan.on_lost(rows.append)
    task = plan.timing_tasks(False, [], None)[0]
    again = lost(task, f"{FLASH2}, backward", "SIGSEGV")
    assert again is not None and again.payload["excluded"] == {FLASH2: "SIGSEGV"}
    assert lost(again, FLASH2, "SIGSEGV") is None  # not for ever
    assert lost(task, "timing, forward", "silent") is None
    assert [row["kind"] for row in rows] == ["lost", "lost"]
    check = plan.correctness_tasks(False, [])[0]
    assert lost(check, "start", "SIGABRT") is None
    assert rows[-1]["status"] == "fail" and rows[-1]["reason"] == "SIGABRT"


@pytest.mark.parametrize(
    ("code", "text", "status"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "pass"),
        (sanitizer.FOUND, "========= Invalid __global__ read\n= ERROR SUMMARY: 1 error", "fail"),
        (1, "========= Error: Device not supported", "unavailable"),
        (1, "ImportError", "unavailable"),
        (None, "", "not finished"),
    ],
)
def test_what_a_sanitizer_said(code: int | None, text: str, status: str) -> None:
    row = sanitizer.verdict("memcheck", code, text)
    assert row["status"] == status and (status == "pass" or row["reason"])


def test_a_sanitizer_that_finds_something_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\n[ "$2" = memcheck ] && { echo "========= Invalid read"; exit 77; }\n'
        'echo "$FASTBEIT_SANITIZED_TASK"; exit 0\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer, "find_tool", lambda: str(tool))
    met = []
    rows = sanitizer.run_beside(tmp_path, {}, lambda: met.append(1), 10.0)
    assert met == [1]
    assert {(row["tool"], row["status"]) for row in rows} == {
        ("memcheck", "fail"),
        ("racecheck", "pass"),
    }
    assert "query subset" in (tmp_path / "racecheck.log").read_text()


def test_without_a_sanitizer_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitizer, "find_tool", lambda: None)
    met = []
    rows = sanitizer.run_beside(tmp_path, {}, lambda: met.append(1), 10.0)
    assert met == [1] and {row["status"] for row in rows} == {"unavailable"}
