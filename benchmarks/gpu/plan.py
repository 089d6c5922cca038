"""Which tasks a run does, in order of worth, and what becomes of one whose process is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks import peers, problems
from benchmarks.gpu import cases, integration
from benchmarks.gpu.pool import Task

Row = dict[str, Any]

# Seconds without a word after which a step counts as hung: compiling kernels, or autotuning.
CHECK_SILENCE_S = 150.0  # four kernels compile before the first row, beside many others
KERNEL_SILENCE_S = 90.0
AUTOTUNE_SILENCE_S = 120.0
# The first problems are what the targets are about; they get more samples.
LONG_LIMITS = {"seconds": 4.0, "most_rounds": 100}
SHORT_LIMITS = {"seconds": 2.5, "most_rounds": 60}


def wanted(name: str, only: list[str]) -> bool:
    return not only or any(part.lower() in name.lower() for part in only)


def correctness_tasks(dry: bool, only: list[str]) -> list[Task]:
    """Each case at each precision; bf16 of all first, as training uses it."""
    tasks = []
    for dtype in ("bfloat16", "float16", "float32"):
        for case in cases.CASES:
            dtypes = case.shrunk().dtypes if dry else case.dtypes
            first = dtypes[0] if len(dtypes) == 1 else None
            # fp32-only cases go with the first round: they are the table's.
            if wanted(case.name, only) and (
                dtype in dtypes if first is None else dtype == "bfloat16"
            ):
                tasks.append(_correctness("correctness", case.name, first or dtype, dry))
        if dtype == "bfloat16":
            tasks += [
                _correctness("integration", case.name, "float32" if dry else dtype, dry)
                for case in integration.integration_cases(dry)
                if wanted(case.name, only)
            ]
    return tasks


def _correctness(kind: str, case: str, dtype: str, dry: bool) -> Task:
    payload = {"kind": kind, "case": case, "dtype": dtype, "dry": dry}
    return Task(f"{kind}: {case}, {dtype}", payload, CHECK_SILENCE_S)


def timing_tasks(dry: bool, only: list[str], ceiling: Row | None) -> list[Task]:
    """Quick peers of the four first problems, the slow ones of the first, then the rest."""

    def task(problem: problems.Problem, slow: bool) -> Task:
        first = problem in problems.PROBLEMS[:4]
        payload = {
            "kind": "timing",
            "problem": problem.name,
            "slow": slow,
            "dry": dry,
            "ceiling": ceiling,
            "limits": LONG_LIMITS if first else SHORT_LIMITS,
        }
        silence_s = AUTOTUNE_SILENCE_S if slow else KERNEL_SILENCE_S
        return Task(f"timing: {problem.name}{', slow peers' if slow else ''}", payload, silence_s)

    chosen = [problem for problem in problems.PROBLEMS if wanted(problem.name, only)]
    quick = [task(problem, False) for problem in chosen]
    slow = [task(problem, True) for problem in chosen]
    return [*quick[:4], *slow[:1], *quick[4:], *slow[1:]]


def on_lost(emit: Callable[[Row], None]) -> Callable[[Task, str, str], Task | None]:
    """A lost correctness task fails, a lost contestant is left out of another try."""

    def lost(task: Task, step: str, reason: str) -> Task | None:
        payload = task.payload
        if payload["kind"] in ("correctness", "integration"):
            emit(
                {
                    "kind": "correctness",
                    "check": "runs to its end"
                    if payload["kind"] == "correctness"
                    else "integration",
                    "case": payload["case"],
                    "dtype": payload["dtype"],
                    "status": "fail",
                    "reason": reason,
                }
            )
            return None
        if payload["kind"] != "timing":
            emit({"kind": "lost", "task": task.name, "step": step, "reason": reason})
            return None
        culprit = _contestant(step)
        excluded = payload.get("excluded", {})
        if culprit is None or culprit in excluded:
            emit({"kind": "lost", "task": task.name, "step": step, "reason": reason})
            return None
        excluded = {**excluded, culprit: reason}
        return replace(task, payload={**payload, "excluded": excluded})

    return lost


def _contestant(step: str) -> str | None:
    """Whose step it was; longest name first, since some names begin others."""
    for name in sorted((peer.name for peer in peers.PEERS), key=len, reverse=True):
        if step.startswith(name):
            return name
    return None
