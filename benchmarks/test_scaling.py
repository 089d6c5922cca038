"""Processes: the same global batch by one process, and shared by several.

    pytest benchmarks/test_scaling.py --benchmark-only

On a CPU the demo's recipe in fp32 by two processes; on GPUs BEiT-B's, at its micro-batch and
precision, by one process a GPU. Every process takes micro-batches of the same size; one alone takes
several of them for a step, so that all compute the same updates: losses must be those of one
process. On a CPU a process has one thread, alone too: with fewer cores than processes, efficiency
says how they share them and nothing of communication. ``efficiency`` is (time of one process) /
(processes x time of all).
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.photos import make_photos
from benchmarks.steps import runs
from benchmarks.steps.clock import PartClock
from benchmarks.steps.problem import base_for, demo
from benchmarks.steps.runs import Finished
from benchmarks.suite import DEVICE, NO_TWIN, measure, missing, name_row
from benchmarks.suite_rows import REFERENCE
from fastbeit.hardware import physical_cores
from fastbeit.training.config_io import save_config

CLOCK = PartClock()
PHOTOS = 64
if DEVICE == "cpu":
    PROBLEM, PART, DTYPE, PROCESSES = demo(), "demo recipe", "float32", 2
    LINES, EVERY = 3, 5
    FIRST, LATER = 1e-5, 1e-5
else:
    PROBLEM, PART, DTYPE = base_for(DEVICE), "BEiT-B", "bfloat16"
    PROCESSES = max(2, torch.cuda.device_count())
    LINES, EVERY = 3, 20
    FIRST, LATER = 2e-3, 2e-2
"""Relative difference of losses at the first line of metrics, and at later ones: in 16 bits another
order of sums moves the weights apart, step by step."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that choose it."""
    if DEVICE == "cpu":
        return ["demo", "--workers=0", "--precision=fp32"]
    folder = tmp_path_factory.mktemp("scaling")
    return base_recipe(folder, PROCESSES)


def base_recipe(folder: Path, copies: int) -> list[str]:
    """BEiT-B's on photographs, each ``copies`` times: an epoch holds a batch of all processes."""
    (folder / "photos").mkdir()
    photos = make_photos(folder / "photos", PHOTOS).folder
    for path in list(photos.iterdir()):
        for number in range(1, copies):
            shutil.copy(path, photos / f"{path.stem}-{number}{path.suffix}")
    problem = base_for(DEVICE)
    tokenizer = runs.random_tokenizer(folder / "tokenizer.safetensors", problem)
    save_config(runs.base_config(photos, tokenizer, problem), folder / "config.json")
    return [f"--config={folder / 'config.json'}"]


def flags(processes: int, micro_batch: int) -> list[str]:
    """The recipe, stopped after a few lines of metrics, before any export."""
    stop = LINES * EVERY
    return [
        "--no-evaluate",
        "--warmup-steps=10",
        f"--global-batch={processes * micro_batch}",
        f"--micro-batch={micro_batch}",
        f"--log-every={EVERY}",
        f"--stop-after={stop}",
        f"--checkpoint-every={stop + 1}",
        "--steps=1000",
    ]


def assert_same_losses(found: list[float], wanted: list[float]) -> None:
    assert found[:1] == pytest.approx(wanted[:1], rel=FIRST)
    assert found == pytest.approx(wanted, rel=LATER)


@pytest.fixture(scope="module")
def alone() -> dict[int, Finished]:
    """Runs of one process, by the number of processes that share its batch."""
    return {}


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("path", [REFERENCE, "shared"])
@pytest.mark.parametrize("processes", [PROCESSES])
def test_scaling(
    benchmark: Any,
    alone: dict[int, Finished],
    recipe: list[str],
    tmp_path: Path,
    processes: int,
    path: str,
) -> None:
    """The reference is one process, "shared" are all of them."""
    batch = processes * PROBLEM.batch
    about = {"suite": "scaling", "part": PART, "path": path, "dtype": DTYPE}
    sizes: dict[str, Any] = {"processes": processes, "batch": batch}
    name_row(benchmark, about, sizes)
    if DEVICE == "cuda" and torch.cuda.device_count() < processes:
        missing(f"{processes} processes want a GPU each, and {torch.cuda.device_count()} are there")
    if path != REFERENCE and processes not in alone:
        missing(NO_TWIN)
    found: list[Finished] = []
    steps = (LINES - 1) * EVERY

    def run() -> None:
        began_s = time.perf_counter()
        number = 1 if path == REFERENCE else processes
        words = [*recipe, *flags(processes, PROBLEM.batch)]
        finished = runs.run_processes(number, words, tmp_path / f"{len(found)}")
        found.append(finished)
        CLOCK.leave_out(runs.unmeasured_s(finished, began_s))
        if path == REFERENCE:
            alone[processes] = finished
        assert_same_losses(finished.losses, alone[processes].losses)

    measure(
        benchmark,
        run,
        **about,
        images=steps * batch,
        work=runs.times(PROBLEM.step_work(getattr(torch, DTYPE)), steps * processes),
        rounds=1,
        warmup=0,
        **sizes,
    )
    benchmark.extra_info["cores"] = physical_cores()
    benchmark.extra_info["threads_each"] = 1
    if path != REFERENCE:
        efficiency = alone[processes].seconds / (processes * found[-1].seconds)
        benchmark.extra_info["efficiency"] = efficiency
