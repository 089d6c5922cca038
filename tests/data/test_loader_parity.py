"""DALI and PIL execute the same plan: their views agree pixel by pixel, whatever the file.

Tolerance per view, from the golden files' README: mean difference <= 0.5 / 255 and 99th percentile
<= 2 / 255, jitter included.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from fastbeit.data import BatchSchedule, MaskSpec, PlanSpec, make_loader, open_source
from fastbeit.data.dali_pipeline import build_pipeline, pipeline_inputs
from fastbeit.data.encoded import to_ppm
from fastbeit.data.plan import Plan
from fastbeit.data.views import ViewSpec

GOLDEN = Path(__file__).parent.parent / "golden" / "two_views.safetensors"
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


def test_photos_at_the_recipes_sizes(tmp_path, photo, encode, write):
    files = {
        "a.jpg": encode(photo(375, 500, seed=1), "JPEG", quality=88),
        "b.jpg": encode(photo(333, 251, seed=2), "JPEG", quality=95, subsampling=0),
        "c.png": encode(photo(240, 640, seed=3), "PNG"),
    }
    plan = PlanSpec(mask=MaskSpec(), jitter=(0.4, 0.4, 0.4))
    assert check(both(write(tmp_path / "p", files), plan, ViewSpec(), batch=3, steps=3)) == 18


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_tiny_crops_of_hard_edges(tmp_path, encode, write, resample):
    """Crops of one to a few pixels, of noise in black and white: the worst for a resize."""
    random = np.random.default_rng(0)
    files = {
        f"{height}x{width}.png": encode(
            random.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255), "PNG"
        )
        for height, width in ((1, 1), (1, 9), (7, 1), (2, 3), (9, 8), (31, 5), (28, 28), (64, 47))
    }
    views = ViewSpec(size=(28, 28), token_size=(14, 20), resample=resample, token_resample=resample)
    plan = PlanSpec(mask=GRID, crop_scale=(0.01, 0.3), jitter=(0, 0, 0))
    pairs = both(write(tmp_path / "p", files), plan, views, batch=len(files), steps=8)
    assert check(pairs) == 2 * 8 * len(files)


def through_dali(image, boxes, factors, order, views):
    """Both views of one image, by the graph itself: a row for each box."""
    count, (height, width) = len(boxes), image.shape[:2]
    plan = Plan(
        np.arange(count),
        np.array(boxes, np.int32),
        np.zeros(count, bool),
        np.array(factors, np.float32),
        np.array(order, np.uint8),
        np.zeros((count, 1), np.int32),
        None,
    )
    pipeline = build_pipeline(views, batch=count, jitter=True, depth=1, threads=1, device_id=None)
    ppm = np.frombuffer(to_ppm(Image.fromarray(image)), np.uint8)
    pipeline.feed_input("encoded", [ppm] * count)
    sizes = np.tile(np.array([height, width], np.int32), (count, 1))
    for name, array in pipeline_inputs(plan, sizes, 3, jitter=True).items():
        pipeline.feed_input(name, array)
    pipeline.schedule_run()
    return [np.array(view.as_tensor()).astype(int) for view in pipeline.share_outputs()[:2]]


def test_golden_views_through_dali():
    """The pixels that the official pipeline gives, jitter included, from DALI's graph."""
    golden = load_file(GOLDEN)
    with safe_open(GOLDEN, "np") as file:
        metadata = file.metadata()
    boxes = json.loads(metadata["boxes_top_left_height_width"])
    jitters = json.loads(metadata["jitter_brightness_contrast_saturation_order"])
    image = golden["image"]
    height, width = image.shape[:2]
    student, tokens = through_dali(image, boxes, np.ones((3, 3)), [[0, 1, 2]] * 3, ViewSpec())
    whole = [[0, 0, height, width]] * 3
    order = [row[3] for row in jitters]
    same_size = ViewSpec(size=(height, width), token_size=(8, 8))
    jittered, _ = through_dali(image, whole, [row[:3] for row in jitters], order, same_size)
    for row in range(3):
        for ours, key in (
            (student, f"box{row}.patches_bicubic_224"),
            (tokens, f"box{row}.tokens_lanczos_112"),
            (jittered, f"jitter{row}"),
        ):
            difference = np.abs(ours[row] - golden[key])
            # Well inside the tolerance, so that a change for the worse is seen.
            assert difference.mean() <= 0.05 and np.percentile(difference, 99) <= 1, key


def test_what_a_blend_leaves_alone_stays():
    """Grey under saturation, and everything under factors of 1: exact, whatever the rounding."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    views = ViewSpec(size=(16, 16), token_size=(4, 4))
    saturation = np.linspace(0.6, 1.4, 64)
    factors = np.stack([np.ones(64), np.ones(64), saturation], axis=1)
    boxes, order = [[0, 0, 16, 16]] * 64, [[0, 1, 2], [2, 0, 1]] * 32
    grey, _ = through_dali(ramp, boxes, factors, order, views)
    assert np.array_equal(grey, np.broadcast_to(ramp, grey.shape))
    same, _ = through_dali(colours, boxes, np.ones((64, 3)), order, views)
    assert np.array_equal(same, np.broadcast_to(colours, same.shape))
