"""End to end: `fastbeit.pretrain` from image files to updated weights, loader included.

    pytest benchmarks/test_pretrain.py --benchmark-only

The demo's recipe, and BEiT-B's on photographs of ImageNet's size with a random tokenizer of the
published size. Times are the run's own, from the first line of its metrics to the last: start-up,
checkpoint and export are left out. The reference has plain PyTorch and the PIL loader, "fast" the
defaults. All losses of a run must be the reference's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.photos import make_photos
from benchmarks.roofline import Work
from benchmarks.steps import optimizer_steps, runs
from benchmarks.steps.clock import PartClock
from benchmarks.steps.problem import base_for, demo
from benchmarks.steps.runs import Finished
from benchmarks.suite import DEVICE, NO_TWIN, measure, missing, name_row
from benchmarks.suite_rows import REFERENCE
from fastbeit.environment import cpu_bf16
from fastbeit.training.config import PretrainConfig
from fastbeit.training.distributed import World

CLOCK = PartClock()
BF16 = DEVICE == "cuda" or cpu_bf16() is not None
DTYPE = "bfloat16" if BF16 else "float32"
ALLOWED = 2e-2 if BF16 else 1e-4
"""Relative difference of losses: both paths round to the student's precision, at places of their
own."""
PHOTOS = 64


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with optimizer_steps.one_process() as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, str]:
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "photos").mkdir()
    photos = make_photos(folder / "photos", PHOTOS)
    problem = base_for(DEVICE)
    tokenizer = runs.random_tokenizer(folder / "tokenizer.safetensors", problem)
    return runs.base_config(photos.folder, tokenizer, problem), photos.kind


def time_runs(
    benchmark: Any,
    start: Callable[[int], Finished],
    known: dict[str, list[float]],
    *,
    part: str,
    path: str,
    images: int,
    work: Work,
    rounds: int,
    **sizes: Any,
) -> None:
    """``start(number)`` runs once; losses are compared with those of the reference's first run."""
    name_row(benchmark, {"suite": "pretrain", "part": part, "path": path, "dtype": DTYPE}, sizes)
    if path != REFERENCE and part not in known:
        missing(NO_TWIN)
    found: list[Finished] = []

    def run() -> None:
        began_s = time.perf_counter()
        finished = start(len(found))
        found.append(finished)
        CLOCK.leave_out(runs.unmeasured_s(finished, began_s))
        if path == REFERENCE:
            known.setdefault(part, finished.losses)
        assert finished.losses == pytest.approx(known[part], rel=ALLOWED)

    measure(
        benchmark,
        run,
        suite="pretrain",
        part=part,
        path=path,
        images=images,
        work=work,
        dtype=DTYPE,
        rounds=rounds,
        warmup=0,
        **sizes,
    )
    benchmark.extra_info["data_wait_share"] = found[-1].wait_share
    benchmark.extra_info["loss_nats"] = found[-1].losses


@pytest.fixture(scope="module")
def known() -> dict[str, list[float]]:
    """Losses of the reference's first run, by part."""
    return {}


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("path", [REFERENCE, "fast"])
def test_demo(
    benchmark: Any, world: World, known: dict[str, list[float]], tmp_path: Path, path: str
) -> None:
    """The demo's recipe, whose batches are of 32 images of 28 pixels."""
    problem, lines, every = demo(), 3, 5

    def start(number: int) -> Finished:
        config = runs.for_timing(
            runs.demo_config(problem.batch),
            tmp_path / f"{number}",
            lines,
            every,
            plain=path == REFERENCE,
        )
        return runs.run_here(config, world)

    steps = (lines - 1) * every
    time_runs(
        benchmark,
        start,
        known,
        part="demo",
        path=path,
        images=steps * problem.batch,
        work=runs.times(problem.step_work(getattr(torch, DTYPE)), steps),
        rounds=2,
        batch=problem.batch,
        steps=steps,
    )


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("path", [REFERENCE, "fast"])
def test_base(
    benchmark: Any,
    world: World,
    known: dict[str, list[float]],
    base: tuple[PretrainConfig, str],
    tmp_path: Path,
    path: str,
) -> None:
    """BEiT-B's recipe on photographs."""
    (recipe, kind), problem = base, base_for(DEVICE)
    lines, every = (3, 1) if DEVICE == "cpu" else (3, 20)

    def start(number: int) -> Finished:
        config = runs.for_timing(
            recipe, tmp_path / f"{number}", lines, every, plain=path == REFERENCE
        )
        return runs.run_here(config, world)

    steps = (lines - 1) * every
    time_runs(
        benchmark,
        start,
        known,
        part="BEiT-B",
        path=path,
        images=steps * problem.batch,
        work=runs.times(problem.step_work(getattr(torch, DTYPE)), steps),
        rounds=1 if DEVICE == "cpu" else 2,
        batch=problem.batch,
        steps=steps,
        data=kind,
    )
