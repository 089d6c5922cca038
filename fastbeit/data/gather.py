"""From (step, micro-batch) to bytes and a plan: the part that both loaders share.

A micro-batch is a pure function of the data, the seed and its place in the run. So it does not
matter which worker makes it, and a run that starts at step k gets what an undisturbed run got.

A bad sample i is replaced by the first good one among i + 1, i + 2, ... (modulo the length of the
source), with the plan of the substitute's own number: what stands in for i depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbeit.data.bad import BadRecord
from fastbeit.data.header import BadImage, OpenedImage, open_image
from fastbeit.data.order import BatchSchedule
from fastbeit.data.plan import Plan, PlanSpec, draw_plan
from fastbeit.data.source import Source
from fastbeit.data.views import ViewSpec


class NoGoodSample(Exception):
    """The search for a substitute met more bad samples than a run may have, or nothing else."""


class Sample(NamedTuple):
    """A sample whose header is good: number, encoded bytes, header and lazily opened image."""

    index: int
    data: bytes
    opened: OpenedImage

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, after EXIF orientation."""
        return self.opened.header.height, self.opened.header.width


@dataclass(frozen=True)
class Job:
    """Everything that a worker process needs to know."""

    source: Source
    plan: PlanSpec
    views: ViewSpec
    schedule: BatchSchedule
    seed: int
    accumulation: int
    rank: int
    world_size: int
    max_pixels: int
    bad_limit: int

    @property
    def batch(self) -> int:
        """Samples in a micro-batch."""
        return self.schedule.global_batch // (self.world_size * self.accumulation)

    def indices(self, step: int, micro: int) -> tuple[int, NDArray[np.int64]]:
        """Epoch and sample numbers of a micro-batch of this rank."""
        return self.schedule.indices(
            step,
            micro=micro,
            accumulation=self.accumulation,
            rank=self.rank,
            world_size=self.world_size,
        )


@dataclass
class Gatherer:
    """Reads samples, steps over bad ones and draws plans. One lives in each worker process.

    ``bad`` remembers what this process found (number to reason), so that a bad file is decoded
    once and not once an epoch. Its methods open images: call them inside ``quiet_pil``.
    """

    job: Job
    bad: dict[int, str] = field(default_factory=dict)

    def open(self, index: int) -> Sample:
        """Read one sample and its header.

        Raises:
            BadImage: it can't be read, or ``open_image`` refuses it.
        """
        try:
            data = self.job.source.read(index)
        except OSError as error:
            raise BadImage(f"cannot be read: {error}") from error
        return Sample(index, data, open_image(data, max_pixels=self.job.max_pixels))

    def first_good(self, start: int) -> Sample:
        """The first sample at or after ``start`` that is not known to be bad and opens.

        Raises:
            NoGoodSample: see there.
        """
        total = len(self.job.source)
        for step in range(total):
            index = (start + step) % total
            if index in self.bad:
                continue
            try:
                return self.open(index)
            except BadImage as error:
                self.mark(index, error.reason)
        raise NoGoodSample

    def mark(self, index: int, reason: str) -> None:
        """Remember a bad sample. Raises NoGoodSample when there are too many."""
        self.bad[index] = reason
        if len(self.bad) > self.job.bad_limit:
            raise NoGoodSample

    def samples(self, wanted: NDArray[np.int64], poll: Callable[[], None]) -> list[Sample]:
        """A sample with a good header for each wanted number. ``poll`` is called between them."""
        found = []
        for index in wanted.tolist():
            poll()
            found.append(self.first_good(index))
        return found

    def draw(self, epoch: int, index: list[int], sizes: list[tuple[int, int]]) -> Plan:
        """The plan of samples by number and (height, width) after EXIF orientation."""
        return draw_plan(
            self.job.plan,
            self.job.seed,
            epoch,
            np.array(index, dtype=np.int64),
            np.array(sizes, dtype=np.int64).reshape(-1, 2),
        )

    def replan(self, plan: Plan, row: int, epoch: int, index: int, size: tuple[int, int]) -> None:
        """Overwrite one row of ``plan`` with the plan of the sample that took its place."""
        for values, value in zip(plan, self.draw(epoch, [index], [size]), strict=True):
            if values is not None and value is not None:
                values[row] = value[0]

    def records(self, wanted: NDArray[np.int64], used: NDArray[np.int64]) -> list[BadRecord]:
        """What was stepped over on the way from the wanted to the used sample of each row."""
        found: dict[int, BadRecord] = {}
        total = len(self.job.source)
        for first, last in zip(wanted.tolist(), used.tolist(), strict=True):
            for distance in range((last - first) % total):
                index = (first + distance) % total
                found[index] = self.record(index, last)
        return list(found.values())

    def record(self, index: int, substitute: int) -> BadRecord:
        """The log entry of a sample that is known to be bad."""
        return BadRecord(index, self.job.source.name(index), self.bad[index], substitute)

    def all_records(self) -> list[BadRecord]:
        """Everything this process found bad, without substitutes (-1): for giving up."""
        return [self.record(index, -1) for index in self.bad]
