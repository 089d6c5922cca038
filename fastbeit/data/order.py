"""The order of samples: a pseudo-random permutation of each epoch, computed and never stored.

``permute`` is a Feistel network over the pairs (p // b, p % b) of an a x b rectangle that just
covers the samples, with Philox as its round function. Adding a function of one coordinate to
the other, modulo its range, can be undone, so every round is a bijection for any a and b; a place
outside [0, n) is permuted again until it falls inside ("cycle walking", Black and Rogaway,
CT-RSA 2002). As the rectangle exceeds n by less than its side, that is rare.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbeit.data.philox import MAX_INDEX, Stream, random_words

ROUNDS = 8
"""Rounds for a large source: twice the four that make a Feistel network with random round
functions hard to tell from a random permutation (Luby and Rackoff, 1988)."""

SMALL_SOURCE, SMALL_ROUNDS = 2**16, 24
"""In a tiny rectangle a round function has few values, and mixing takes longer: all 720 orders of
six samples come equally often from 20 rounds on, not with 16 (chi-square over 72,000 orders)."""


def permute(place: ArrayLike, num_samples: int, seed: int, epoch: ArrayLike) -> NDArray[np.int64]:
    """The samples at ``place`` of the order: int64, each in [0, num_samples).

    For a fixed (seed, epoch) it is a bijection of [0, num_samples). ``place`` and ``epoch``
    broadcast. Memory and time grow with the number of places asked for, not with num_samples.
    """
    if not 0 < num_samples <= MAX_INDEX:
        raise ValueError(f"num_samples must lie in [1, {MAX_INDEX}], got {num_samples}")
    sample, epoch = np.broadcast_arrays(np.asarray(place, np.int64), np.asarray(epoch, np.int64))
    shape = sample.shape
    sample, epoch = sample.ravel().copy(), epoch.ravel()
    if sample.size and (sample.min() < 0 or sample.max() >= num_samples):
        raise ValueError(
            f"places must lie in [0, {num_samples}), got {sample.min()} to {sample.max()}"
        )
    rows = isqrt(num_samples - 1) + 1
    columns = -(-num_samples // rows)
    outside = np.arange(sample.size)
    while outside.size:
        sample[outside] = _feistel(sample[outside], rows, columns, seed, epoch[outside])
        outside = outside[sample[outside] >= num_samples]
    return sample.reshape(shape)


def _feistel(
    place: NDArray[np.int64], rows: int, columns: int, seed: int, epoch: NDArray[np.int64]
) -> NDArray[np.int64]:
    row, column = np.divmod(place, columns)
    for number in range(ROUNDS if rows * columns > SMALL_SOURCE else SMALL_ROUNDS):
        if number % 2 == 0:
            row = (row + _below(rows, seed, epoch, column, number)) % rows
        else:
            column = (column + _below(columns, seed, epoch, row, number)) % columns
    return row * columns + column


def _below(
    limit: int, seed: int, epoch: NDArray, coordinate: NDArray, number: int
) -> NDArray[np.int64]:
    word = random_words(seed, epoch, coordinate, Stream.ORDER, number)[0]
    # limit <= 2**24 (the side of the largest rectangle), so the product fits into 64 bits.
    return ((word * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)


@dataclass(frozen=True)
class EpochOrder:
    """The order of the samples in one epoch.

    Attributes:
        num_samples: samples in the source.
        seed: the run's seed.
        epoch: counted from 0; each epoch has its own order.
    """

    num_samples: int
    seed: int
    epoch: int

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Samples at places ``start`` to ``stop - 1``: int64 ``[stop - start]``."""
        return permute(np.arange(start, stop), self.num_samples, self.seed, self.epoch)


@dataclass(frozen=True)
class BatchSchedule:
    """Which samples make up which step, for any number of ranks and accumulation steps.

    Step s of an epoch takes the next ``global_batch`` samples of the epoch's order; the samples
    that do not fill a last batch are dropped (others in each epoch). The set of samples of a step
    depends neither on the number of ranks nor on accumulation, so a run resumes exactly on another
    machine.

    Attributes:
        num_samples: samples in the source.
        global_batch: images per optimizer step, over all ranks and accumulation steps.
        seed: the run's seed.

    Raises:
        ValueError: fewer samples than one global batch.
    """

    num_samples: int
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise ValueError(f"global_batch must be at least 1, got {self.global_batch}")
        if self.num_samples < self.global_batch:
            raise ValueError(
                f"the data holds {self.num_samples} samples, fewer than one global batch of "
                f"{self.global_batch}: lower the global batch, or add images"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; an incomplete last batch is dropped."""
        return self.num_samples // self.global_batch

    def epoch_of(self, step: int) -> int:
        """The epoch that ``step`` (from 0, over the whole run) belongs to."""
        return step // self.steps_per_epoch

    def micro_batch(self, *, accumulation: int, world_size: int) -> int:
        """Images of one rank in one accumulation step.

        Raises:
            ValueError: the global batch can't be shared out equally.
        """
        if accumulation < 1 or world_size < 1:
            raise ValueError(
                "accumulation and world_size must be at least 1, "
                f"got {accumulation} and {world_size}"
            )
        parts = world_size * accumulation
        if self.global_batch % parts:
            raise ValueError(
                f"a global batch of {self.global_batch} can't be shared equally by "
                f"{world_size} ranks x {accumulation} accumulation steps: "
                f"choose a multiple of {parts}"
            )
        return self.global_batch // parts

    def indices(
        self, step: int, *, micro: int, accumulation: int, rank: int, world_size: int
    ) -> tuple[int, NDArray[np.int64]]:
        """The samples of one micro-batch: (epoch, int64 ``[b]``), b = global_batch / (W A).

        Args:
            step: optimizer step, from 0 over the whole run.
            micro: accumulation step, in [0, accumulation).
            accumulation: A, micro-batches per optimizer step and rank.
            rank: in [0, world_size).
            world_size: W, number of data-parallel ranks.
        """
        batch = self.micro_batch(accumulation=accumulation, world_size=world_size)
        if step < 0:
            raise ValueError(f"step must be 0 or more, got {step}")
        if not 0 <= micro < accumulation:
            raise ValueError(f"micro must lie in [0, {accumulation}), got {micro}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch + (micro * world_size + rank) * batch
        return epoch, EpochOrder(self.num_samples, self.seed, epoch).indices(start, start + batch)
