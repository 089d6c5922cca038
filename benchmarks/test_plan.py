"""Time to draw what a batch needs before any pixel is read. No bytes move but the plan's own.

    pytest benchmarks/test_plan.py --benchmark-only

The limit is the data path's budget: 256 images at 20 ms are 12,800 images/s from one core.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastbeit.data import BatchSchedule, MaskSpec, PlanSpec, draw_masks, draw_plan, mask_positions

BATCH = 256
BUDGET_MS = 20.0


def _report(benchmark: Any, images: int, budget_ms: float | None = None) -> None:
    if benchmark.stats is None:  # --benchmark-disable runs the code and measures nothing
        return
    best_ms = benchmark.stats.stats.min * 1e3
    benchmark.extra_info["best_ms"] = best_ms
    benchmark.extra_info["images_per_s"] = images / benchmark.stats.stats.median
    if budget_ms is not None:
        benchmark.extra_info["share_of_budget"] = best_ms / budget_ms
        assert best_ms <= budget_ms, f"{best_ms:.1f} ms for {images} images, over {budget_ms} ms"


def test_plan_256(benchmark: Any) -> None:
    """Crop, flip, jitter, mask positions and DropPath of BEiT-base: within the budget."""
    spec = PlanSpec(drop_path=0.1, depth=12)
    sizes = np.tile([[375, 500]], (BATCH, 1))
    benchmark(draw_plan, spec, 0, 1, np.arange(BATCH), sizes)
    _report(benchmark, BATCH, BUDGET_MS)


@pytest.mark.parametrize("strategy", ["block", "random"])
def test_masks_256(benchmark: Any, strategy: Any) -> None:
    """Masks of the 14x14 grid, as positions."""
    spec = MaskSpec(strategy=strategy)

    def draw() -> None:
        mask_positions(draw_masks(spec, 0, 1, np.arange(BATCH)), spec.slots)

    benchmark(draw)
    _report(benchmark, BATCH)


def test_order_2048(benchmark: Any) -> None:
    """The samples of one global batch of ImageNet-1k."""
    schedule = BatchSchedule(num_samples=1_281_167, global_batch=2048, seed=0)
    benchmark(schedule.indices, 9, micro=0, accumulation=1, rank=0, world_size=1)
    _report(benchmark, 2048)
