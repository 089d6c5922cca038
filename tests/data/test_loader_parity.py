"""DALI and PIL execute the same plan: their views agree pixel by pixel, whatever the file.

Tolerance per view, from the golden files' README: mean difference <= 0.5 / 255 and 99th percentile
<= 2 / 255, jitter included.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastbeit.data import BatchSchedule, MaskSpec, PlanSpec, make_loader, open_source
from fastbeit.data.views import ViewSpec

MEAN, P99 = 0.5, 2.0
GRID = MaskSpec(grid=(4, 4), target=6, min_block=2)


def both(folder: Path, plan: PlanSpec, views: ViewSpec, *, batch: int, steps: int):
    """(name, view, DALI's pixels, PIL's pixels) of every sample, pixels in 0..255."""
    source = open_source(folder)
    schedule = BatchSchedule(len(source), batch, seed=1)
    batches = {}
    for backend in ("dali", "reference"):
        with make_loader(
            source, plan, views, schedule, seed=5, total_steps=steps, backend=backend, workers=0
        ) as loader:
            batches[backend] = list(loader)
            assert loader.backend == backend and loader.bad.count == 0
    std = torch.tensor(views.std[: views.channels]).reshape(-1, 1, 1)
    for ours, theirs in zip(batches["dali"], batches["reference"], strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.positions, theirs.positions)
        for row, index in enumerate(ours.index.tolist()):
            name = source.name(index)
            yield name, "student", *(255 * std * b.images[row] for b in (ours, theirs))
            scale = 255 / views.token_scale
            yield name, "tokens", *(scale * b.token_images[row] for b in (ours, theirs))


def check(pairs) -> int:
    count = 0
    for name, view, ours, theirs in pairs:
        difference = (ours - theirs).abs().numpy()
        assert difference.mean() <= MEAN, (name, view, difference.mean())
        assert np.percentile(difference, 99) <= P99, (name, view, np.percentile(difference, 99))
        count += 1
    return count


@pytest.mark.parametrize("channels", [3, 1])
def test_every_kind_of_file_gives_the_same_views(tmp_path, write, zoo, channels):
    folder = write(tmp_path / "zoo", zoo)
    views = ViewSpec(size=(48, 56), token_size=(24, 28), channels=channels)
    steps = 4  # four epochs of one batch: other crops, flips, factors and orders in each
    pairs = both(folder, PlanSpec(mask=GRID), views, batch=len(zoo), steps=steps)
    assert check(pairs) == 2 * steps * len(zoo)
