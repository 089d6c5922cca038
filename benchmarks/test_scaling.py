"""Processes: the same global batch of the demo's recipe by one process, and shared by several.

    pytest benchmarks/test_scaling.py --benchmark-only

Every process takes micro-batches of the same size; one alone takes several of them for a step, so
that all compute the same updates: losses must be those of one process. On a CPU a process has one
thread, alone too: with fewer cores than processes, efficiency says how they share them and nothing
of communication. ``efficiency`` is (time of one process) / (processes x time of all).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.steps import runs
from benchmarks.steps.clock import PartClock
from benchmarks.steps.problem import demo
from benchmarks.steps.runs import Finished
from benchmarks.suite import DEVICE, measure, missing
from fastbeit.hardware import physical_cores

CLOCK = PartClock()
MICRO_BATCH = 32
LINES, EVERY = (3, 5) if DEVICE == "cpu" else (3, 50)
SIZES = [2] if DEVICE == "cpu" else [2, 4, 8]
FLAGS = ["demo", "--workers=0", "--precision=fp32", "--no-evaluate", "--warmup-steps=10"]
ALLOWED = 1e-5


def flags(processes: int) -> list[str]:
    """The recipe, stopped after a few lines of metrics, before any export."""
    stop = LINES * EVERY
    return [
        *FLAGS,
        f"--global-batch={processes * MICRO_BATCH}",
        f"--micro-batch={MICRO_BATCH}",
        f"--log-every={EVERY}",
        f"--stop-after={stop}",
        f"--checkpoint-every={stop + 1}",
        "--steps=1000",
    ]


@pytest.fixture(scope="module")
def alone() -> dict[int, Finished]:
    """Runs of one process, by the number of processes that share its batch."""
    return {}


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("path", ["reference", "shared"])
@pytest.mark.parametrize("processes", SIZES)
def test_scaling(
    benchmark: Any, alone: dict[int, Finished], tmp_path: Path, processes: int, path: str
) -> None:
    """The reference is one process, "shared" are all of them."""
    if DEVICE == "cuda" and torch.cuda.device_count() < processes:
        missing(f"{processes} processes want a GPU each, and {torch.cuda.device_count()} are there")
    found: list[Finished] = []
    batch = processes * MICRO_BATCH
    steps = (LINES - 1) * EVERY

    def run() -> None:
        began_s = time.perf_counter()
        number = 1 if path == "reference" else processes
        finished = runs.run_processes(number, flags(processes), tmp_path / f"{len(found)}")
        found.append(finished)
        CLOCK.leave_out(runs.unmeasured_s(finished, began_s))
        wanted = alone.setdefault(processes, finished)
        assert finished.losses == pytest.approx(wanted.losses, rel=ALLOWED)

    measure(
        benchmark,
        run,
        suite="scaling",
        part="demo recipe",
        path=path,
        images=steps * batch,
        work=runs.times(demo().step_work(), steps * batch // demo().batch),
        rounds=1,
        warmup=0,
        processes=processes,
        batch=batch,
    )
    benchmark.extra_info["cores"] = physical_cores()
    benchmark.extra_info["threads_each"] = 1
    if path == "shared":
        efficiency = alone[processes].seconds / (processes * found[-1].seconds)
        benchmark.extra_info["efficiency"] = efficiency
