"""Levers of the step: each computes what the reference does, and every one has a row; what a GPU
would be asked for, chosen here by its name alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks.steps import optimizer_steps, step_paths
from benchmarks.steps.optimizer_steps import LEVERS, Levers, up_to
from benchmarks.steps.problem import TINY
from benchmarks.suite_rows import AGAIN
from benchmarks.test_step import COMPARED, assert_same_steps, taken
from fastbeit.training.distributed import World
from fastbeit_kernels._dispatch import why_not


@pytest.fixture(scope="module")
def reference() -> tuple[float, float]:
    """Loss and gradient norm of two steps' last."""
    return two_steps(Levers())


def two_steps(levers: Levers) -> tuple[float, float]:
    with optimizer_steps.one_process() as world:
        if world.device.type != "cpu":
            pytest.skip("on a GPU the benchmark itself compares them")
        step = optimizer_steps.ours(TINY, world, torch.float32, levers)
        step()
        loss, norm = step()
    return loss.item(), norm.item()


@pytest.mark.parametrize("lever", ["pruning", "head", "channels_last", "attention"])
def test_a_lever_changes_no_result(lever: str, reference: tuple[float, float]) -> None:
    """All kernels together take too long to interpret; the kernels' own tests hold them."""
    if lever == "attention" and (reason := why_not("cpu", 0)) is not None:
        pytest.skip(reason)
    assert two_steps(up_to(lever)) == pytest.approx(reference, rel=1e-5)


def test_levers_are_cumulative_and_all_have_a_row() -> None:
    assert [*LEVERS, "auto"] == [field.name for field in fields(Levers)]
    assert up_to("head") == Levers(pruning=True, head=True)
    assert up_to("graph") == Levers(**dict.fromkeys(LEVERS, True))


WORLD = cast(World, None)
"""No step is built."""


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_paths, "DEVICE", "cuda")
    monkeypatch.setattr(step_paths, "COMPILES", True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Levers]:
    """Levers of the steps that would have been built."""
    found: list[Levers] = []

    def ours(problem: Any, world: Any, dtype: torch.dtype, levers: Levers) -> Any:
        found.append(levers)

    monkeypatch.setattr(optimizer_steps, "ours", ours)
    return found


@pytest.mark.usefixtures("on_a_gpu")
def test_on_a_gpu_the_kernels_have_a_path_beside_what_auto_takes(asked: list[Levers]) -> None:
    everything = Levers(**dict.fromkeys(LEVERS, True))
    assert all(step_paths.why_not(lever) is None for lever in LEVERS)
    for path in ("reference", AGAIN, "kernels", "fast"):
        step_paths.build_step(path, TINY, WORLD, torch.bfloat16)
    by_auto = replace(everything, attention=False, kernels=False, auto=True)
    assert asked == [Levers(), Levers(), everything, by_auto]


@pytest.mark.usefixtures("on_a_gpu")
def test_a_graph_is_compared_with_the_same_step_without(asked: list[Levers]) -> None:
    for path in ("fast", "kernels"):
        levers = step_paths.levers_of(path)
        eager = step_paths.without_graph(TINY, WORLD, levers)
        assert levers is not None and levers.graph and eager is not None
        eager(torch.bfloat16)
        assert asked.pop() == replace(levers, graph=False)
    assert step_paths.without_graph(TINY, WORLD, step_paths.levers_of("official style")) is None
    assert step_paths.without_graph(TINY, WORLD, Levers()) is None


@pytest.mark.usefixtures("on_a_gpu")
def test_in_fp32_a_gpu_compiles_no_peer() -> None:
    with pytest.raises(pytest.skip.Exception, match="the dtype of training"):
        step_paths.build_step("timm, compiled", TINY, WORLD, torch.float32)


def test_what_a_cpu_has_not_got_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_paths, "DEVICE", "cpu")
    monkeypatch.setattr(step_paths, "COMPILES", False)
    for path, reason in (("kernels", "kernels are for GPUs"), ("timm, compiled", "gains nothing")):
        with pytest.raises(pytest.skip.Exception, match=reason):
            step_paths.build_step(path, TINY, WORLD, torch.float32)
    assert step_paths.why_not("graph") == step_paths.GRAPH_ALONE
    assert not step_paths.all_levers().graph


def test_a_replay_that_stands_still_is_caught() -> None:
    """As one does that reads inputs, a learning rate or weights of its capture."""

    def going(stuck_at: int) -> optimizer_steps.Step:
        number = 0

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal number
            number += 1
            now = torch.tensor(4.0 - 0.02 * min(number, stuck_at))
            return now, 2 * now

        return step

    wanted = taken(going(100), COMPARED)
    assert COMPARED >= optimizer_steps.WARM_UPS + 3
    assert_same_steps(taken(going(100), COMPARED), wanted, torch.float32)
    with pytest.raises(AssertionError, match=f"step {COMPARED - 1} of those compared"):
        stuck = taken(going(optimizer_steps.WARM_UPS + 1), COMPARED)
        assert_same_steps(stuck, wanted, torch.bfloat16)


def test_on_a_gpu_what_is_worth_most_comes_first(
    run_python: Callable[..., subprocess.CompletedProcess[str]], repo_root: Path
) -> None:
    """The dtype of training, our kernels and the levers, before what compiles for long."""
    script = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "benchmarks/test_step.py",
                      "benchmarks/test_model.py", "benchmarks/test_scaling.py"]))
"""
    done = run_python(
        "-c",
        script,
        cwd=repo_root,
        env={
            "PYTHONPATH": f"{repo_root}{os.pathsep}{repo_root / 'kernels'}",
            "CUDA_VISIBLE_DEVICES": "",
        },
        timeout_s=100,
    )
    ids = [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]
    order = [
        "test_step[reference-bfloat16]",
        "test_step[kernels-bfloat16]",
        "test_levers[reference]",
        "test_levers[graph]",
        "test_levers[reference, again]",
        "test_batch_sizes[kernels-256]",
        "test_peers[timm, compiled-bfloat16]",
        "test_other_dtype[reference-float32]",
        "test_forward[fast-bfloat16]",
        "test_forward[fast-float32]",
        "test_scaling[2-shared]",
    ]
    assert [name for name in ids if name in order] == order
