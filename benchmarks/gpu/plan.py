"""Which tasks a run does, in order of worth, and what becomes of one whose process is lost.

Correctness: the few long ones about whole steps first, then round the operations, one case of each
in turn, bf16 of all before fp16 and fp32. Timings: what targets are about, of every operation,
beside the quick peers; the next problems beside these; what targets are about beside those that
compile for long; then the rest in the same way.
While others wait, no operation's timings take more than its share (`Operation.share`) of the time
for timings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from benchmarks.gpu import curve, replay
from benchmarks.gpu.pool import Task
from benchmarks.operation import Case, Operation, Problem
from benchmarks.operations import OPERATIONS, problem_by_name
from benchmarks.timing import Limits

Row = dict[str, Any]

# Seconds without a word after which a step counts as hung: compiling kernels, or autotuning.
CHECK_SILENCE_S = 150.0  # four kernels compile before the first row, beside many others
STEP_SILENCE_S = 200.0  # 200 steps twice, or builds and cold compiles between two rows
KERNEL_SILENCE_S = 90.0
AUTOTUNE_SILENCE_S = 120.0
# What targets are about gets more samples. Of 2 s, seven contestants get 28 rounds of 10 ms.
LIMITS: dict[int, Row] = {
    0: {"seconds": 2.0, "most_rounds": 100},
    1: {"seconds": 1.2, "most_rounds": 60},
    2: {"seconds": 0.8, "most_rounds": 60},
}


def wanted(name: str, only: list[str]) -> bool:
    return not only or any(part.lower() in name.lower() for part in only)


def cases_in_turn(only: list[str]) -> list[tuple[Operation, Case]]:
    """The first case of each operation, the second of each, and so on."""
    rounds = itertools.zip_longest(*([(op, case) for case in op.cases] for op in OPERATIONS))
    flat = itertools.chain.from_iterable(rounds)
    return [pair for pair in flat if pair is not None and wanted(pair[1].name, only)]


def problems_in_turn(worth: int, only: list[str]) -> list[tuple[Operation, Problem]]:
    """The same of the problems of a worth."""
    listed = [[(op, p) for p in op.problems if p.worth == worth] for op in OPERATIONS]
    flat = itertools.chain.from_iterable(itertools.zip_longest(*listed))
    return [pair for pair in flat if pair is not None and wanted(pair[1].name, only)]


def correctness_tasks(dry: bool, only: list[str]) -> list[Task]:
    """Each case at each precision; bf16 of all first, as training uses it."""
    tasks = step_tasks(dry, only)
    pairs = cases_in_turn(only)
    for dtype in ("bfloat16", "float16", "float32"):
        for operation, case in pairs:
            dtypes = case.shrunk().dtypes if dry else case.dtypes
            first = dtypes[0] if len(dtypes) == 1 else None
            # Cases of one precision go with the first round: they are what they are about.
            if dtype in dtypes if first is None else dtype == "bfloat16":
                tasks.append(_correctness("correctness", operation, case, first or dtype, dry))
        if dtype == "bfloat16":
            tasks += [
                _correctness("integration", operation, case, "float32" if dry else dtype, dry)
                for operation, case in pairs
                if case.machinery
            ]
    return tasks


def step_tasks(dry: bool, only: list[str]) -> list[Task]:
    """The step as a whole; bf16 interpreted or emulated takes long and judges nothing."""
    return [
        Task(
            f"{kind}: {case}, {dtype}",
            {"kind": kind, "case": case, "dtype": dtype, "dry": dry},
            STEP_SILENCE_S,
            group=case,
        )
        for kind, case, dtypes in (
            ("curve", curve.CASE, curve.DTYPES),
            ("replay", replay.CASE, replay.DTYPES),
        )
        if wanted(case, only)
        for dtype in (("float32",) if dry else dtypes)
    ]


def _correctness(kind: str, operation: Operation, case: Case, dtype: str, dry: bool) -> Task:
    payload = {"kind": kind, "case": case.name, "dtype": dtype, "dry": dry}
    name = f"{kind}: {case.name}, {dtype}"
    return Task(name, payload, CHECK_SILENCE_S, group=operation.name)


def timing_tasks(dry: bool, only: list[str], ceiling: Row | None) -> list[Task]:
    """Quick peers before slow ones, a worth ahead; of each, the operations in turn."""

    def task(operation: Operation, problem: Problem, slow: bool) -> Task:
        payload = {
            "kind": "timing",
            "problem": problem.name,
            "slow": slow,
            "dry": dry,
            "ceiling": ceiling,
            "limits": LIMITS[problem.worth],
        }
        silence_s = AUTOTUNE_SILENCE_S if slow else KERNEL_SILENCE_S
        name = f"timing: {problem.name}{', slow peers' if slow else ''}"
        return Task(name, payload, silence_s, group=operation.name)

    return [
        task(*pair, slow)
        for worth, slow in ((0, False), (1, False), (0, True), (2, False), (1, True), (2, True))
        for pair in problems_in_turn(worth, only)
    ]


def most_important(tasks: list[Task]) -> list[Task]:
    """Of the timings, the first: what targets are about, beside the quick peers."""
    first = itertools.takewhile(
        lambda task: (
            not task.payload["slow"]
            and problem_by_name(task.payload["problem"])[1].worth == min(LIMITS)
        ),
        tasks,
    )
    return list(first)


def timing_shares(seconds: float) -> dict[str, float]:
    """Seconds of each operation, of all that there are for timings."""
    return {operation.name: operation.share * seconds for operation in OPERATIONS}


def measuring_s(tasks: Iterable[Task]) -> float:
    """Seconds that timings measure for at most, without what it takes to prepare them: each group
    ends with its limit in each pass, unless a few rounds alone take longer."""
    found = 0.0
    for task in tasks:
        _, problem = problem_by_name(task.payload["problem"])
        found += len(problem.passes) * Limits(**task.payload["limits"]).seconds
    return found


def on_lost(emit: Callable[[Row], None]) -> Callable[[Task, str, str], Task | None]:
    """A lost correctness task fails, a lost contestant is left out of another try."""

    def lost(task: Task, step: str, reason: str) -> Task | None:
        payload = task.payload
        if payload["kind"] in ("correctness", "curve", "integration", "replay"):
            emit(
                {
                    "kind": "correctness",
                    "check": "integration"
                    if payload["kind"] == "integration"
                    else "runs to its end",
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
        culprit = _contestant(payload["problem"], step)
        excluded = payload.get("excluded", {})
        if culprit is None or culprit in excluded:
            emit({"kind": "lost", "task": task.name, "step": step, "reason": reason})
            return None
        excluded = {**excluded, culprit: reason}
        return replace(task, payload={**payload, "excluded": excluded})

    return lost


def _contestant(problem: str, step: str) -> str | None:
    """Whose step it was; longest name first, since some names begin others."""
    operation, _ = problem_by_name(problem)
    for name in sorted((peer.name for peer in operation.peers), key=len, reverse=True):
        if step.startswith(name):
            return name
    return None
