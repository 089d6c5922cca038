"""Milliseconds on a GPU: contestants interleaved and shuffled, inputs rotated through L2."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SPIN_CYCLES = 1_000_000


@dataclass(frozen=True)
class Timing:
    """Median and spread (10th to 90th percentile) of ``n`` samples."""

    ms: float
    low_ms: float
    high_ms: float
    n: int


Call = Callable[[], None]
Timer = Callable[[Sequence[Sequence[Call]], float], list[Timing]]


def summary(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    return Timing(statistics.median(ordered), low, high, len(ordered))


def time_on_gpu(contestants: Sequence[Sequence[Call]], seconds: float) -> list[Timing]:
    """Time each contestant for about ``seconds`` in all, five rounds at least.

    Args:
        contestants: for each, the same work on several sets of inputs that together exceed L2.
    """
    for calls in contestants:
        for call in calls:
            call()
    torch.cuda.synchronize()
    samples: list[list[float]] = [[] for _ in contestants]
    order = list(range(len(contestants)))
    shuffle = random.Random(0).shuffle
    end = time.monotonic() + seconds
    while len(samples[0]) < 5 or time.monotonic() < end:
        shuffle(order)
        pairs = {}
        for number in order:
            # The device waits until the host has queued the whole sample.
            torch.cuda._sleep(SPIN_CYCLES)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            for call in contestants[number]:
                call()
            events[1].record()
            pairs[number] = events
        torch.cuda.synchronize()
        for number, (begin, finish) in pairs.items():
            samples[number].append(begin.elapsed_time(finish) / len(contestants[number]))
    return [summary(one) for one in samples]
