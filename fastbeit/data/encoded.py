"""What DALI is fed with: encoded bytes and the plan, a micro-batch at a time.

A sample goes to DALI's decoder as it is when that decoder gives PIL's pixels for its format (see
``dali_reads``); any other is decoded by PIL and handed over as a PPM, which is its raw pixels
behind a line of text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastbeit.data.bad import BadRecord
from fastbeit.data.decode import decode_opened
from fastbeit.data.gather import Gatherer, Job, NoGoodSample, Sample
from fastbeit.data.header import BadImage, ImageHeader, quiet_pil
from fastbeit.data.plan import Plan


class EncodedImage(NamedTuple):
    """One sample for DALI: number, (height, width) after EXIF orientation, bytes."""

    index: int
    size: tuple[int, int]
    data: bytes


class EncodedBatch(NamedTuple):
    """A micro-batch of undecoded images. B images.

    Attributes:
        epoch: of this micro-batch; a substitute's plan is drawn for it.
        wanted: int64 ``[B]``, the samples asked for.
        index: int64 ``[B]``, the samples used.
        data: uint8, all files one after another.
        ends: int64 ``[B]``, where each file ends in ``data``.
        sizes: int32 ``[B, 2]``, height and width after EXIF orientation.
        box, flip, jitter, jitter_order, positions, drop_scale: the plan's fields.
        bad: what was found unusable on the way.
        complete: False when no good sample was found.
    """

    epoch: int
    wanted: Tensor
    index: Tensor
    data: Tensor
    ends: Tensor
    sizes: Tensor
    box: Tensor
    flip: Tensor
    jitter: Tensor
    jitter_order: Tensor
    positions: Tensor
    drop_scale: Tensor | None
    bad: list[BadRecord]
    complete: bool

    def plan(self) -> Plan:
        """The plan as arrays, sharing memory with this batch."""
        return Plan(
            self.index.numpy(),
            self.box.numpy(),
            self.flip.numpy(),
            self.jitter.numpy(),
            self.jitter_order.numpy(),
            self.positions.numpy(),
            None if self.drop_scale is None else self.drop_scale.numpy(),
        )

    def files(self) -> list[np.ndarray]:
        """One uint8 array a sample, sharing memory with this batch."""
        return np.split(self.data.numpy(), self.ends.numpy()[:-1])


def dali_reads(header: ImageHeader) -> bool:
    """Whether DALI's decoder gives PIL's pixels for this kind of file, on a CPU and on a GPU.

    Compared on DALI 2.4's CPU decoder: JPEG (grey, YCbCr, RGB; baseline, progressive), 8-bit PNG
    (all colour types) and plain WebP are equal in every pixel, EXIF orientation included. CMYK
    differs by rounding on a CPU and by more where nvJPEG does it; GIF and AVIF can't be read.
    """
    if header.format in ("JPEG", "MPO"):
        return header.mode in ("L", "RGB")
    return header.bits <= 8 and (
        header.format == "PNG" or (header.format == "WEBP" and header.mode == "RGB")
    )


def to_ppm(pixels: Image.Image) -> bytes:
    """PIL's L or RGB pixels as a file that any decoder reads back unchanged."""
    kind = b"P5" if pixels.mode == "L" else b"P6"
    return b"%s\n%d %d\n255\n" % (kind, pixels.width, pixels.height) + pixels.tobytes()


def by_pil(sample: Sample, channels: int) -> bytes:
    """The sample decoded by PIL, as a PPM. Raises BadImage. Call it inside ``quiet_pil``."""
    return to_ppm(decode_opened(sample.opened, sample.data, channels))


def encoded_image(gatherer: Gatherer, start: int) -> EncodedImage:
    """The first usable sample from ``start`` on. Only what DALI can't read is decoded here."""
    sample = gatherer.first_good(start)
    while not dali_reads(sample.opened.header):
        try:
            data = by_pil(sample, gatherer.job.views.channels)
            return EncodedImage(sample.index, sample.size, data)
        except BadImage as error:
            gatherer.mark(sample.index, error.reason)
            sample = gatherer.first_good(sample.index + 1)
    return EncodedImage(sample.index, sample.size, sample.data)


def encoded_batch(
    gatherer: Gatherer,
    epoch: int,
    wanted: NDArray[np.int64],
    images: list[EncodedImage],
    plan: Plan,
) -> EncodedBatch:
    """Images and their plan as one NamedTuple of tensors."""
    data = np.frombuffer(b"".join(image.data for image in images), np.uint8).copy()
    return EncodedBatch(
        epoch=epoch,
        wanted=torch.from_numpy(wanted),
        index=torch.from_numpy(plan.index),
        data=torch.from_numpy(data),
        ends=torch.from_numpy(np.cumsum([len(image.data) for image in images], dtype=np.int64)),
        sizes=torch.tensor([image.size for image in images], dtype=torch.int32),
        box=torch.from_numpy(plan.box),
        flip=torch.from_numpy(plan.flip),
        jitter=torch.from_numpy(plan.jitter),
        jitter_order=torch.from_numpy(plan.jitter_order),
        positions=torch.from_numpy(plan.positions),
        drop_scale=None if plan.drop_scale is None else torch.from_numpy(plan.drop_scale),
        bad=gatherer.records(wanted, plan.index),
        complete=True,
    )


class EncodedWork:
    """Makes micro-batches: ``work(step, micro) -> EncodedBatch``. Picklable."""

    def __init__(self, job: Job) -> None:
        self._gatherer = Gatherer(job)

    def __call__(
        self, step: int, micro: int, poll: Callable[[], None] = lambda: None
    ) -> EncodedBatch:
        gatherer = self._gatherer
        epoch, wanted = gatherer.job.indices(step, micro)
        try:
            images = []
            with quiet_pil():
                for index in wanted.tolist():
                    poll()
                    images.append(encoded_image(gatherer, index))
        except NoGoodSample:
            return no_images(epoch, gatherer.all_records())
        plan = gatherer.draw(epoch, [i.index for i in images], [i.size for i in images])
        return encoded_batch(gatherer, epoch, wanted, images, plan)


def no_images(epoch: int, bad: list[BadRecord]) -> EncodedBatch:
    """What is handed over when no good sample was found."""
    empty = torch.empty(0)
    return EncodedBatch(
        epoch=epoch,
        wanted=empty,
        index=empty,
        data=empty,
        ends=empty,
        sizes=empty,
        box=empty,
        flip=empty,
        jitter=empty,
        jitter_order=empty,
        positions=empty,
        drop_scale=None,
        bad=bad,
        complete=False,
    )
