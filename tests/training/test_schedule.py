"""The cosine schedule against values of the official code."""

import json
import math
from pathlib import Path

import pytest

from fastbeit.training.schedule import cosine_schedule

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules.json"


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["cosine"])
def test_equals_official_values(case):
    args = case["args"]
    total = args["epochs"] * args["niter_per_ep"]
    assert total == case["length"]
    for step, expected in case["values"].items():
        got = cosine_schedule(
            int(step),
            args["base_value"],
            args["final_value"],
            total,
            args["warmup_epochs"] * args["niter_per_ep"],
        )
        assert math.isclose(got, expected, rel_tol=1e-12, abs_tol=0.0)


def test_without_warmup_starts_at_base():
    assert cosine_schedule(0, 1e-3, 1e-5, 10, 0) == 1e-3


def test_warmup_start_and_single_warmup_step():
    assert cosine_schedule(0, 1.0, 0.0, 10, 3, warmup_start=0.25) == 0.25
    assert cosine_schedule(2, 1.0, 0.0, 10, 3, warmup_start=0.25) == 1.0
    assert cosine_schedule(0, 1.0, 0.0, 10, 1) == 0.0


@pytest.mark.parametrize(("step", "total", "warmup"), [(10, 10, 0), (-1, 10, 0), (0, 10, 11)])
def test_outside_the_run_is_refused(step, total, warmup):
    with pytest.raises(ValueError, match="must be between"):
        cosine_schedule(step, 1.0, 0.0, total, warmup)
