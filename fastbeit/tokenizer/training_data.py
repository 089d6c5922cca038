"""Images for tokenizer training, through the same sources and loaders as pre-training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbeit.data import BatchSchedule, MaskSpec, PlanSpec, make_loader
from fastbeit.data.header import BadImage, inspect_image
from fastbeit.data.source import Source, open_source
from fastbeit.data.views import ViewSpec
from fastbeit.tokenizer.train_config import TrainConfig

HELD_OUT_EVERY = 20
_INSPECTED_IMAGES = 256


class Subset:
    """Some images of a source, in its order; a Source itself."""

    def __init__(self, source: Source, rows: NDArray[np.int64]) -> None:
        self.source = source
        self.rows = rows

    @property
    def labels(self) -> NDArray[np.int64] | None:
        labels = self.source.labels
        return None if labels is None else labels[self.rows]

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.source.fingerprint.encode())
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int, /) -> bytes:
        return self.source.read(int(self.rows[index]))

    def name(self, index: int, /) -> str:
        return self.source.name(int(self.rows[index]))


def open_sources(config: TrainConfig) -> tuple[Source, Source]:
    """Training and validation images, disjoint.

    Raises:
        ValueError: nothing there, too few images, or images smaller than a token.
    """
    if config.validation_data is not None:
        train, validation = open_source(config.data), open_source(config.validation_data)
    elif config.data == "demo":
        train = open_source("demo", split="train")
        validation = open_source("demo", split="validation")
    else:
        everything = open_source(config.data)
        rows = np.arange(len(everything))
        held_out = rows % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        train = Subset(everything, rows[~held_out])
        validation = Subset(everything, rows[held_out])
    _check_enough(config, train, validation)
    _check_sizes(config, train)
    return train, validation


def _check_enough(config: TrainConfig, train: Source, validation: Source) -> None:
    tokens = (config.image_px // config.network().stride) ** 2
    if len(train) < config.batch:
        raise ValueError(
            f"{config.data} has {len(train)} images to train on, fewer than one batch of "
            f"{config.batch}: add images, or lower --batch"
        )
    if len(train) * tokens < config.codes:
        raise ValueError(
            f"{len(train)} images of {tokens} tokens can't fill {config.codes} codes even once: "
            "add images, or lower --codes"
        )
    if len(validation) == 0:
        raise ValueError(
            f"no image is left for validation: {config.data} has {len(train)} images and every "
            f"{HELD_OUT_EVERY}th is held out; add images, or give --validation-data"
        )


def _check_sizes(config: TrainConfig, source: Source) -> None:
    """Refuses a data set whose images are smaller than one token, judged by a sample of them."""
    stride = config.network().stride
    rows = np.unique(np.linspace(0, len(source) - 1, _INSPECTED_IMAGES).astype(int))
    small = []
    for row in rows.tolist():
        try:
            header = inspect_image(source.read(row))
        except (BadImage, OSError):
            continue  # the loader counts and replaces bad images
        if min(header.width, header.height) < stride:
            small.append(f"{source.name(row)} ({header.width} x {header.height})")
    if len(small) > len(rows) // 100:
        raise ValueError(
            f"{len(small)} of {len(rows)} inspected images are smaller than one token of "
            f"{stride} x {stride} pixels, such as {small[0]}: give larger images, or fewer "
            "--widths for smaller tokens"
        )


def _views(config: TrainConfig) -> ViewSpec:
    network = config.network()
    side = config.image_px
    return ViewSpec(
        # The student's view is not looked at: as small as can be.
        size=(network.stride, network.stride),
        token_size=(side, side),
        token_resample=network.resample,
        channels=network.channels,
        mean=(0.5,) * network.channels,
        std=(0.5,) * network.channels,
        token_scale=network.pixel_scale,
        token_offset=network.pixel_offset,
    )


def _plan(config: TrainConfig, *, augmented: bool) -> PlanSpec:
    mask = MaskSpec(grid=(1, 1), target=1, strategy="none")
    if not augmented:  # the whole image where it is square, else the middle of it
        return PlanSpec(
            mask=mask, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=(0, 0, 0)
        )
    return PlanSpec(
        mask=mask,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        flip=config.flip,
        jitter=config.jitter,
    )


@contextmanager
def training_batches(
    config: TrainConfig, source: Source, device: torch.device
) -> Iterator[Iterator[Tensor]]:
    """An iterator of ``steps`` augmented batches [B, C, H, W] of mapped pixels."""
    loader = make_loader(
        source,
        _plan(config, augmented=True),
        _views(config),
        BatchSchedule(len(source), config.batch, config.seed),
        seed=config.seed,
        total_steps=config.steps,
        backend=config.loader,
        workers=config.workers,
        device=device,
    )
    with loader:
        yield (batch.token_images for batch in loader)


def whole_images(config: TrainConfig, source: Source, limit: int, device: torch.device) -> Tensor:
    """Up to ``limit`` images, not augmented, on the CPU: [n, C, H, W] of mapped pixels."""
    count = min(limit, len(source))
    batch = min(config.batch, count)
    loader = make_loader(
        source,
        _plan(config, augmented=False),
        _views(config),
        BatchSchedule(len(source), batch, config.seed),
        seed=config.seed,
        total_steps=count // batch,
        backend=config.loader,
        workers=config.workers,
        device=device,
    )
    with loader:
        return torch.cat([batch.token_images.cpu() for batch in loader])
