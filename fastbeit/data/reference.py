"""The reference loader: PIL, in worker processes. Always there, and the specification of the other.

Micro-batches are made whole, one by one worker each, as uint8 arrays; see ``workers`` for the
processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastbeit.data.bad import BadRecord
from fastbeit.data.decode import decode_opened
from fastbeit.data.gather import Gatherer, Job, NoGoodSample, Sample
from fastbeit.data.header import BadImage, quiet_pil
from fastbeit.data.views import draw_views


class ViewBatch(NamedTuple):
    """A micro-batch before ``finish_views``. B images, M mask slots.

    Attributes:
        index: int64 ``[B]``, the samples used, substitutes included.
        images, token_images: uint8 ``[B, h, w, C]``.
        positions: int32 ``[B, M]``.
        drop_scale: float32 ``[B, 2 * depth]`` or None.
        bad: what was found unusable on the way.
        complete: False when no good sample was found; then B is 0.
    """

    index: Tensor
    images: Tensor
    token_images: Tensor
    positions: Tensor
    drop_scale: Tensor | None
    bad: list[BadRecord]
    complete: bool


class ReferenceWork:
    """Makes micro-batches: ``work(step, micro) -> ViewBatch``. Picklable."""

    def __init__(self, job: Job) -> None:
        self._gatherer = Gatherer(job)

    def __call__(self, step: int, micro: int, poll: Callable[[], None] = lambda: None) -> ViewBatch:
        job, gatherer = self._gatherer.job, self._gatherer
        epoch, wanted = job.indices(step, micro)
        views = job.views
        try:
            with quiet_pil():
                samples = gatherer.samples(wanted, poll)
                plan = gatherer.draw(epoch, [s.index for s in samples], [s.size for s in samples])
                images = np.empty((len(samples), *views.size, views.channels), np.uint8)
                tokens = np.empty((len(samples), *views.token_size, views.channels), np.uint8)
                samples.reverse()
                for row in range(len(samples)):
                    poll()
                    # Popped, so that at most one decoded image is alive.
                    sample, pixels = self._decode(samples.pop())
                    if sample.index != plan.index[row]:
                        gatherer.replan(plan, row, epoch, sample.index, sample.size)
                    view, token_view = draw_views(pixels, plan, row, views)
                    # Bytes, as PIL's array interface takes twice as long on a small image.
                    images[row].reshape(-1)[:] = np.frombuffer(view.tobytes(), np.uint8)
                    tokens[row].reshape(-1)[:] = np.frombuffer(token_view.tobytes(), np.uint8)
        except NoGoodSample:
            return no_views(gatherer.all_records())
        return ViewBatch(
            torch.from_numpy(plan.index),
            torch.from_numpy(images),
            torch.from_numpy(tokens),
            torch.from_numpy(plan.positions),
            None if plan.drop_scale is None else torch.from_numpy(plan.drop_scale),
            gatherer.records(wanted, plan.index),
            True,
        )

    def _decode(self, sample: Sample) -> tuple[Sample, Image.Image]:
        """The sample and its pixels, or the next good one's."""
        while True:
            try:
                channels = self._gatherer.job.views.channels
                return sample, decode_opened(sample.opened, sample.data, channels)
            except BadImage as error:
                self._gatherer.mark(sample.index, error.reason)
                sample = self._gatherer.first_good(sample.index + 1)


def no_views(bad: list[BadRecord]) -> ViewBatch:
    """What a worker hands over when it found no good sample."""
    empty = torch.empty(0)
    return ViewBatch(empty, empty, empty, empty, None, bad, False)
