"""The training curve's check: curves that stay together pass, those that part don't."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import curve
from benchmarks.gpu.curve import Lesson, check_curve

CPU = torch.device("cpu")
STEPS = torch.arange(200, dtype=torch.float64)


def made(change):
    """Losses that fall by half; bf16's are off by a tenth of a percent; ours are changed."""

    def losses(lesson, kernels, dtype, device):
        found = 3 + 3 * torch.exp(-STEPS / 50)
        if lesson.shaken:  # from step 100 on it parts from itself by a percent
            assert kernels == "reference" and dtype == torch.float32
            return found * (1 + 1e-2 * (STEPS >= 100))
        if dtype == torch.bfloat16:
            found = found * (1 + 1e-3 * torch.cos(STEPS))
        return change(found, dtype) if kernels == "triton" else found

    return losses


def status(dtype, change) -> tuple[str, str]:
    rows = []
    check_curve(dtype, CPU, rows.append, shrink=False, curve=made(change))
    return rows[0]["status"], rows[0]["reason"]


def with_nan(x: torch.Tensor, _dtype: torch.dtype) -> torch.Tensor:
    return torch.where(STEPS == 100, float("nan"), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_curves_that_stay_together(dtype) -> None:
    assert status(dtype, lambda x, _: x) == ("pass", "")
    assert status(dtype, with_nan) == ("fail", "a loss is not finite")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, _: x * (1 + 2e-5 * (STEPS == 4)), "over the first 10 steps"),
        (lambda x, _: x * (1 + 2e-3 * (STEPS == 50)), "at step 51"),
        (lambda x, _: x * (1 + 3e-2 * (STEPS == 150)), "at step 151"),
    ],
)
def test_fp32_parts_by_more_than_rounding(change, reason) -> None:
    assert reason in status("float32", change)[1]
    assert status("float32", lambda x, _: x * (1 + 1e-6))[0] == "pass"
    assert status("float32", lambda x, _: x * (1 + 2e-2 * (STEPS == 150)))[0] == "pass"


def test_weights_are_shaken_by_their_last_bit() -> None:
    lesson = Lesson().shrunk()
    plain, shaken = (
        curve.losses(replace(lesson, shaken=by), "reference", torch.float32, CPU)
        for by in (0.0, curve.LAST_BIT)
    )
    assert 0 < (shaken - plain).abs().max() <= 1e-5 * plain.max()


def test_bf16_is_held_to_what_bf16_costs_the_reference() -> None:
    assert status("bfloat16", lambda x, _: x * 1.01)[0] == "fail"
    assert status("bfloat16", lambda x, _: x * 1.001)[0] == "pass"


def test_a_curve_that_learns_nothing_compares_nothing(monkeypatch) -> None:
    monkeypatch.setattr(curve, "LEARNT", 0.1)
    assert "learnt nothing" in status("float32", lambda x, _: x)[1]


def test_pictures_are_the_same_each_time_and_can_be_learnt() -> None:
    """A patch's code goes up by constant steps, so what is hidden follows from what is seen."""
    lesson = Lesson().shrunk()
    images, positions, targets = curve.pictures(lesson, 5, CPU)
    for mine, again in zip(
        (images, positions, targets), curve.pictures(lesson, 5, CPU), strict=True
    ):
        assert torch.equal(mine, again)
    assert not torch.equal(images, curve.pictures(lesson, 6, CPU)[0])
    assert images.shape == (2, 3, 12, 12) and positions.shape == targets.shape == (2, 4)
    assert positions[0, -1] == -1 and targets.max() < lesson.codes
    whole = Lesson(batch=1, slots=49, codes=10**5, patch=1)
    _, places, codes = curve.pictures(whole, 1, CPU)
    grid = codes[0, :48]
    down = {int(grid[i + 7] - grid[i]) for i in range(41)}
    assert places[0, :48].tolist() == list(range(48)) and len(down) == 1
