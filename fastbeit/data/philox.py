"""Philox4x32-10, the counter-based generator behind every random decision about a sample.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.3; the
tests hold the known-answer vectors of its reference library, Random123.

A counter-based generator has no state: a number is a function of a key and a counter. Here the
key is the run's seed and the counter says whose number it is: (sample, stream, epoch, draw). So the
decisions about a sample do not depend on the batch, the rank or the worker that asks for them, and
nothing has to be saved for a resume.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)

MAX_INDEX = 2**48
"""Sample numbers lie below this: the 16 bits above them in the counter hold the stream."""


class Stream(IntEnum):
    """What a number is for. Two streams of one sample never share a counter."""

    CROP = 1
    COLOUR = 2
    MASK = 3
    DROP_PATH = 4
    ORDER = 5


def philox4x32(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike],
    key: tuple[int, int],
    rounds: int = 10,
) -> tuple[NDArray[np.uint64], ...]:
    """Four random 32-bit words for every counter.

    Args:
        counter: four arrays of 32-bit words (any integer dtype, each value below 2**32) that
            broadcast to one shape ``[...]``.
        key: two 32-bit words.
        rounds: 10, as published.

    Returns:
        Four uint64 arrays ``[...]`` with values below 2**32. (They stay 64 bits wide because each
        round needs the full 64-bit product.)
    """
    shape = np.broadcast_shapes(*(np.shape(word) for word in counter))
    c0, c1, c2, c3 = (
        np.broadcast_to(np.asarray(word).astype(np.uint64), shape).copy() for word in counter
    )
    key_0, key_1 = key
    for _ in range(rounds):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0 = product_1 >> _SHIFT_32
        c0 ^= c1
        c0 ^= np.uint64(key_0)
        c2 = product_0 >> _SHIFT_32
        c2 ^= c3
        c2 ^= np.uint64(key_1)
        c1 = product_1 & _LOW_32
        c3 = product_0 & _LOW_32
        key_0 = (key_0 + _WEYL_0) & 0xFFFFFFFF
        key_1 = (key_1 + _WEYL_1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_words(
    seed: int, epoch: ArrayLike, index: ArrayLike, stream: Stream, draw: ArrayLike
) -> tuple[NDArray[np.uint64], ...]:
    """Four 32-bit words (as uint64) for each (epoch, index, draw), broadcast to one shape.

    Raises:
        ValueError: a seed, epoch, index or draw that does not fit into the key or the counter.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
    index = _whole(index, "index", MAX_INDEX)
    high = (index >> _SHIFT_32) | np.uint64(int(stream) << 16)
    counter = (
        index & _LOW_32,
        high,
        _whole(epoch, "epoch", 2**32),
        _whole(draw, "draw", 2**32),
    )
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))


def uniforms(
    seed: int, epoch: ArrayLike, index: ArrayLike, stream: Stream, draw: ArrayLike
) -> tuple[NDArray[np.float64], ...]:
    """Four independent uniform numbers for each (epoch, index, draw): float64, strictly in (0, 1).

    They are the midpoints of 2**32 equal cells, so ``floor(u * n)`` is below ``n`` and its
    probabilities are off by at most 2**-32.
    """
    words = random_words(seed, epoch, index, stream, draw)
    return tuple((word.astype(np.float64) + 0.5) * 2.0**-32 for word in words)


def _whole(values: ArrayLike, name: str, limit: int) -> NDArray[np.uint64]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(f"{name} must be whole numbers, got dtype {array.dtype}")
    if array.size and (int(array.min()) < 0 or int(array.max()) >= limit):
        raise ValueError(
            f"{name} must lie in [0, {limit}), got values from {array.min()} to {array.max()}"
        )
    return array.astype(np.uint64)
