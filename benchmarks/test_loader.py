"""Images per second of the loaders, one core: decode, jitter, both views, plan, normalised batch.

    pytest benchmarks/test_loader.py --benchmark-only

Two kinds of data: photo-like JPEGs of 500x375 at about 60 KB (a smooth texture with noise, from a
fixed seed), as ImageNet's are, and the demo's 28x28 PNGs. The same work is done by the reference
loader (PIL), by DALI (CPU operators, one thread; or the GPU if there is one) and, for the photos,
by PIL's operators called plainly one after another on the full image, as published pipelines do it.
Before anything is timed the results are compared. Everything runs in this process, worker processes
multiply it. On a CPU the clock is the process's CPU time, all threads together, so that a rate is a
core's and other work on the machine does not count; on a GPU it is wall time.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from fastbeit.batch import MimBatch
from fastbeit.data import BatchSchedule, MaskSpec, PlanSpec, draw_plan, make_loader, open_source
from fastbeit.data.loader import Loader
from fastbeit.data.plan import Plan
from fastbeit.data.source import Source
from fastbeit.data.views import ViewSpec, finish_views

PHOTOS, SEED = 64, 0
BATCH = {"photos": 32, "demo": 256}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMER = time.perf_counter if DEVICE == "cuda" else time.process_time
ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
WORK = {
    "photos": (PlanSpec(drop_path=0.1, depth=12), ViewSpec()),
    "demo": (
        PlanSpec(mask=MaskSpec(grid=(7, 7), target=20, min_block=4), jitter=(0.0, 0.0, 0.0)),
        ViewSpec((28, 28), (28, 28), channels=1, mean=(0.5,), std=(0.5,)),
    ),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(SEED)
    for number in range(PHOTOS):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        pixels = (smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        (folder / f"{number:03}.jpg").write_bytes(file.getvalue())
    return open_source(folder)


def open_loader(data: str, source: Source, backend: Any) -> Loader:
    schedule = BatchSchedule(len(source), BATCH[data], SEED)
    return make_loader(
        source,
        *WORK[data],
        schedule,
        seed=SEED,
        total_steps=1_000_000,
        backend=backend,
        workers=0,
        device=DEVICE,
    )


def plain_batches(source: Source) -> Iterator[MimBatch]:
    """The photos' batches by PIL's operators, each on the whole image."""
    spec, views = WORK["photos"]
    schedule = BatchSchedule(len(source), BATCH["photos"], SEED)
    step = 0
    while True:
        epoch, index = schedule.indices(step, micro=0, accumulation=1, rank=0, world_size=1)
        images = [Image.open(io.BytesIO(source.read(i))).convert("RGB") for i in index.tolist()]
        plan = draw_plan(
            spec, SEED, epoch, index, [(image.height, image.width) for image in images]
        )
        pairs = [plain_views(image, plan, row, views) for row, image in enumerate(images)]
        students, tokens = (np.stack(views_) for views_ in zip(*pairs, strict=True))
        drop_scale = None if plan.drop_scale is None else torch.from_numpy(plan.drop_scale)
        finished = finish_views(students, tokens, views, DEVICE)
        positions = torch.from_numpy(plan.positions)
        yield MimBatch(*finished, positions, drop_scale, torch.from_numpy(index))
        step += 1


def plain_views(
    image: Image.Image, plan: Plan, row: int, views: ViewSpec
) -> tuple[np.ndarray, np.ndarray]:
    for step in plan.jitter_order[row].tolist():
        image = ENHANCE[step](image).enhance(float(plan.jitter[row, step]))
    if plan.flip[row]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left, height, width = plan.box[row].tolist()
    crop = image.crop((left, top, left + width, top + height))
    (rows, columns), (token_rows, token_columns) = views.size, views.token_size
    student = crop.resize((columns, rows), Image.Resampling.BICUBIC)
    tokens = crop.resize((token_columns, token_rows), Image.Resampling.LANCZOS)
    return np.asarray(student), np.asarray(tokens)


def assert_same_work(ours: MimBatch, theirs: MimBatch) -> None:
    """Within the tolerance of the golden views: mean 0.5 / 255, 99th percentile 2 / 255."""
    assert torch.equal(ours.index, theirs.index)
    assert torch.equal(ours.positions, theirs.positions)
    difference = ((ours.token_images - theirs.token_images).abs() * (255 / 0.8)).cpu().numpy()
    assert difference.mean() <= 0.5 and np.percentile(difference, 99) <= 2


def measure(benchmark: Any, data: str, following: Callable[[], MimBatch], source: Source) -> None:
    following()  # the first batch pays for imports, tables and thread pools
    benchmark.pedantic(following, rounds=10, iterations=1)
    if benchmark.stats is None:  # --benchmark-disable runs the code and measures nothing
        return
    median_s = benchmark.stats.stats.median
    benchmark.extra_info["images_per_s"] = BATCH[data] / median_s
    benchmark.extra_info["us_per_image"] = median_s / BATCH[data] * 1e6
    sizes = [len(source.read(number)) for number in range(16)]
    benchmark.extra_info["kilobytes_per_image"] = sum(sizes) / len(sizes) / 1000
    benchmark.extra_info["device"] = DEVICE


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("backend", ["reference", "dali"])
@pytest.mark.parametrize("data", ["photos", "demo"])
def test_loader(benchmark: Any, request: pytest.FixtureRequest, data: str, backend: str) -> None:
    source = request.getfixturevalue("photos") if data == "photos" else open_source("demo")
    with open_loader(data, source, backend) as loader:
        with open_loader(data, source, "reference") as reference:
            assert_same_work(next(loader), next(reference))
        measure(benchmark, data, lambda: next(loader), source)


@pytest.mark.benchmark(timer=TIMER)
def test_plain_pil(benchmark: Any, photos: Source) -> None:
    """The yardstick: what cropping early and looking values up saves."""
    batches = plain_batches(photos)
    with open_loader("photos", photos, "reference") as reference:
        assert_same_work(next(batches), next(reference))
    measure(benchmark, "photos", lambda: next(batches), photos)
