"""Runs that the suites start, their clock, their checkpoints; and all suites once in tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.steps import optimizer_steps, runs
from benchmarks.steps.clock import PartClock
from benchmarks.steps.stores import Checkpoints, OneFile, write_rate
from benchmarks.test_checkpoint import assert_comes_back
from fastbeit.recipes import smoke
from fastbeit.training.distributed import World

STEP_SUITES = ("tokenizer", "model", "step", "checkpoint")


@pytest.fixture
def world() -> Iterator[World]:
    with optimizer_steps.one_process() as found:
        yield found


def test_the_clock_stands_still_outside() -> None:
    clock = PartClock()
    began_s, began = time.perf_counter(), clock()
    with clock.outside():
        time.sleep(0.05)
    clock.leave_out(0.0)
    assert clock() - began <= time.perf_counter() - began_s - 0.05
    assert clock.__name__


@pytest.mark.parametrize("plain", [True, False])
def test_a_run_in_this_process_ends_after_its_lines(
    world: World, tmp_path: Path, plain: bool
) -> None:
    config = runs.for_timing(smoke.config(), tmp_path, 3, 2, plain=plain)
    assert config.run.kernels == ("reference" if plain else "auto")
    began_s = time.perf_counter()
    finished = runs.run_here(config, world)
    assert len(finished.losses) == 3
    assert finished.images == 4 * config.run.global_batch
    assert finished.images_per_s == pytest.approx(finished.images / finished.seconds)
    assert 0 <= finished.wait_share <= 1
    assert 0 < finished.seconds < time.perf_counter() - began_s
    assert runs.unmeasured_s(finished, began_s) > 0
    assert not any((tmp_path / "checkpoints").iterdir())  # nothing was saved


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    flags = ["smoke", "--workers=0", "--precision=fp32", "--micro-batch=16", "--log-every=1"]
    flags += ["--stop-after=3", "--no-evaluate", "--device=cpu"]
    one, two = (runs.run_processes(n, flags, tmp_path / f"{n}") for n in (1, 2))
    assert len(one.losses) == 3
    assert two.losses == pytest.approx(one.losses, rel=1e-5)


def test_a_run_that_fails_says_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="--steps"):
        runs.run_processes(1, ["smoke", "--steps=-1"], tmp_path / "run")


def test_a_time_needs_two_lines(tmp_path: Path) -> None:
    line = {"loss_nats": 1.0, "time_s": 2.0, "images_seen": 4, "data_wait_share": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="1 lines of metrics"):
        runs.read(tmp_path)


def test_what_a_store_keeps_comes_back(world: World, tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 5), "b": torch.arange(4.0)}
    (tmp_path / "file").mkdir()
    for store in (OneFile(tmp_path / "file", state), Checkpoints(tmp_path / "dcp", state, world)):
        assert_comes_back(store, state)
        assert_comes_back(store, state)  # and again, over the one before
    assert write_rate(tmp_path) > 0


def test_a_store_that_keeps_less_is_caught(tmp_path: Path) -> None:
    class Forgetful(OneFile):
        def load(self) -> None:
            super().load()
            self.tensors["b"].zero_()

    state = {"a": torch.ones(3), "b": torch.ones(2)}
    with pytest.raises(AssertionError, match=r"1 tensors come back otherwise: \['b'\]"):
        assert_comes_back(Forgetful(tmp_path, state), state)


def test_suites_run_once_in_tiny_sizes(
    run_python: Callable[..., subprocess.CompletedProcess[str]], repo_root: Path
) -> None:
    """``--benchmark-disable`` tries the code: checks and one call, nothing of ViT-B's size."""
    modules = [f"benchmarks/test_{name}.py" for name in STEP_SUITES]
    done = run_python(
        *("-m", "pytest", "--benchmark-disable", "-p", "no:cacheprovider", "-q", *modules),
        *("-k", "not batch_sizes and not transformers"),
        cwd=repo_root,
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{repo_root / 'kernels'}{os.pathsep}"},
        timeout_s=200,
    )
    assert " passed" in done.stdout and "failed" not in done.stdout
