"""Images per second of the loaders, one core: decode, jitter, both views, plan, normalised batch.

    pytest benchmarks/test_loader.py --benchmark-only

Two kinds of data: JPEGs of ImageNet's size (`benchmarks.photos`; each row names what they show) and
the demo's 28x28 PNGs. The same work is done by the reference loader (PIL), by DALI (CPU operators,
one thread; "mixed" decodes on a GPU) and, for the photos, in the official style: PIL's operators
one after another on the full image. Before anything is timed the results are compared. Everything
runs in this process, worker processes multiply it. On a CPU the clock is the process's CPU time,
all threads together, so that a rate is a core's and other work on the machine does not count; on a
GPU it is wall time.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from benchmarks import suite
from benchmarks.photos import Photos, make_photos
from benchmarks.suite import DEVICE, missing, name_row
from fastbeit.batch import MimBatch
from fastbeit.data import BatchSchedule, MaskSpec, PlanSpec, draw_plan, make_loader, open_source
from fastbeit.data.loader import Loader
from fastbeit.data.plan import Plan
from fastbeit.data.source import Source
from fastbeit.data.views import ViewSpec, finish_views
from fastbeit.environment import dali

PHOTOS, SEED = 64, 0
BATCH = {"photos": 32, "demo": 256}
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
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    return make_photos(tmp_path_factory.mktemp("photos"), PHOTOS)


def open_loader(data: str, source: Source, backend: Any, device: str) -> Loader:
    schedule = BatchSchedule(len(source), BATCH[data], SEED)
    return make_loader(
        source,
        *WORK[data],
        schedule,
        seed=SEED,
        total_steps=1_000_000,
        backend=backend,
        workers=0,
        device=device,
    )


def plain_batches(source: Source) -> Generator[MimBatch, None, None]:
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
    assert torch.equal(ours.positions.cpu(), theirs.positions.cpu())
    difference = (
        ((ours.token_images - theirs.token_images.to(ours.token_images)).abs() * (255 / 0.8))
        .cpu()
        .numpy()
    )
    assert difference.mean() <= 0.5 and np.percentile(difference, 99) <= 2


def time_batches(
    benchmark: Any, photos: Photos, data: str, path: str, open_path: Callable[[Source], Any]
) -> None:
    """``open_path`` gives a loader, entered as a context; its first batch is compared. Batches end
    on the device, as in training: who makes them elsewhere moves them."""
    kind = photos.kind if data == "photos" else "PNG"
    about = {"suite": "loader", "part": data, "path": path, "dtype": "float32"}
    sizes = {"batch": BATCH[data], "data": kind}
    name_row(benchmark, about, sizes)
    if path.startswith("DALI") and not (found := dali()).usable:
        missing(str(found))
    if path == "DALI, mixed" and DEVICE == "cpu":
        missing("it decodes on a GPU, and there is none")
    source = open_source(photos.folder if data == "photos" else "demo")
    with open_path(source) as loader:

        def check() -> None:
            with open_loader(data, source, "reference", DEVICE) as reference:
                assert_same_work(next(loader).to(DEVICE), next(reference).to(DEVICE))

        suite.measure(
            benchmark,
            lambda: next(loader).to(DEVICE),
            check=check,
            images=BATCH[data],
            rounds=3,
            **about,
            **sizes,
        )
    files = [len(source.read(number)) for number in range(16)]
    benchmark.extra_info["kilobytes_per_image"] = sum(files) / len(files) / 1000


PATHS = {
    "reference": ("reference", DEVICE),
    "DALI, CPU": ("dali", "cpu"),
    "DALI, mixed": ("dali", "cuda"),
}


@pytest.mark.benchmark(timer=TIMER)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("data", WORK)
def test_loader(benchmark: Any, photos: Photos, data: str, path: str) -> None:
    backend, device = PATHS[path]
    time_batches(
        benchmark, photos, data, path, lambda source: open_loader(data, source, backend, device)
    )


@pytest.mark.benchmark(timer=TIMER)
def test_official_style(benchmark: Any, photos: Photos) -> None:
    """The yardstick: what cropping early and looking values up saves."""
    time_batches(
        benchmark,
        photos,
        "photos",
        "official style",
        lambda source: contextlib.closing(plain_batches(source)),
    )
