"""Levers of the step: each computes what the reference does, and every one has a row."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from benchmarks.steps import optimizer_steps
from benchmarks.steps.optimizer_steps import LEVERS, Levers, up_to
from benchmarks.steps.problem import TINY
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
