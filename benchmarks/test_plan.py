"""Time to draw what a batch needs before any pixel is read. No bytes move but the plan's own.

    pytest benchmarks/test_plan.py --benchmark-only

The limit is the data path's budget: 256 images at 20 ms are 12,800 images/s from one core. The
references draw the same, to the bit, for one image at a time. In part "order" the reference
shuffles a whole epoch (``torch.randperm``, as samplers do) for one batch of it, ours computes the
batch's places in an order that is never written out. It is another order, so what is compared is
that each names as many different samples, and none that isn't there. The clock is the process's CPU
time: one core's work.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.suite import measure
from fastbeit.data import BatchSchedule, MaskSpec, PlanSpec, draw_masks, draw_plan, mask_positions
from fastbeit.data.plan import Plan

BATCH = 256
BUDGET_MS = 20.0
PATHS = ["reference", "fast"]
SAMPLES = 1_281_167


def assert_within_budget(benchmark: Any) -> None:
    if benchmark.stats is not None:
        best_ms = benchmark.stats.stats.min * 1e3
        benchmark.extra_info["share_of_budget"] = best_ms / BUDGET_MS
        assert best_ms <= BUDGET_MS, f"{best_ms:.1f} ms for {BATCH} images, over {BUDGET_MS} ms"


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("path", PATHS)
def test_plan(benchmark: Any, path: str) -> None:
    """Crop, flip, jitter, mask positions and DropPath of BEiT-base: within the budget."""
    spec = PlanSpec(drop_path=0.1, depth=12)
    sizes = np.tile([[375, 500]], (BATCH, 1))
    index = np.arange(BATCH)

    def at_once() -> list[Plan]:
        return [draw_plan(spec, 0, 1, index, sizes)]

    def one_by_one() -> list[Plan]:
        return [draw_plan(spec, 0, 1, index[i : i + 1], sizes[i : i + 1]) for i in range(BATCH)]

    def check() -> None:
        (whole,), single = at_once(), one_by_one()
        for name in ("box", "flip", "jitter", "positions", "drop_scale"):
            joined = np.concatenate([getattr(plan, name) for plan in single])
            assert np.array_equal(getattr(whole, name), joined), f"{name} differs"

    measure(
        benchmark,
        at_once if path == "fast" else one_by_one,
        suite="plan",
        part="plan",
        path=path,
        check=check,
        images=BATCH,
        rounds=5 if path == "fast" else 3,
        batch=BATCH,
    )
    if path == "fast":
        assert_within_budget(benchmark)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("strategy", ["block", "random"])
def test_masks(benchmark: Any, strategy: Any, path: str) -> None:
    """Masks of the 14x14 grid, as positions."""
    spec = MaskSpec(strategy=strategy)
    index = np.arange(BATCH)

    def at_once() -> np.ndarray:
        return mask_positions(draw_masks(spec, 0, 1, index), spec.slots)

    def one_by_one() -> np.ndarray:
        rows = [
            mask_positions(draw_masks(spec, 0, 1, index[i : i + 1]), spec.slots)
            for i in range(BATCH)
        ]
        return np.concatenate(rows)

    def check() -> None:
        assert np.array_equal(at_once(), one_by_one())

    measure(
        benchmark,
        at_once if path == "fast" else one_by_one,
        suite="plan",
        part=f"masks, {strategy}",
        path=path,
        check=check,
        images=BATCH,
        rounds=5 if path == "fast" else 3,
        batch=BATCH,
    )


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("path", PATHS)
def test_order(benchmark: Any, path: str) -> None:
    """The samples of one global batch of ImageNet-1k, as a resumed run asks for them."""
    schedule = BatchSchedule(num_samples=SAMPLES, global_batch=2048, seed=0)

    def on_the_spot() -> np.ndarray:
        return np.asarray(schedule.indices(9, micro=0, accumulation=1, rank=0, world_size=1)[1])

    def whole_epoch() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(SAMPLES, generator=generator)
        return order[9 * 2048 : 10 * 2048].numpy()

    run = on_the_spot if path == "fast" else whole_epoch

    def check() -> None:
        """Two shuffles are never equal; both name as many different samples of the data."""
        found = run()
        assert len(np.unique(found)) == 2048
        assert 0 <= found.min() and found.max() < SAMPLES

    measure(
        benchmark,
        run,
        suite="plan",
        part="order",
        path=path,
        check=check,
        images=2048,
        batch=2048,
    )
