"""Time of device work: events, many samples, contestants interleaved, order shuffled.

A sample of a contestant is one call on each of several input sets (together larger than L2), with
an event before and after. On a GPU a spinning kernel goes first, so that the host has queued the
whole sample before the device begins it: what is measured is the device's time, not Python's. A
sample whose queue ran dry is taken again behind a longer spin; if it still does (calls that wait
for the device always do), it is kept and marked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one call: on the device, and of the host to queue it."""

    device_ms: float
    host_ms: float
    host_bound: bool = False


@dataclass(frozen=True)
class Stats:
    """Of one contestant. ``samples`` of ``calls`` calls each; milliseconds are those of a call."""

    ms: float
    p10_ms: float
    p90_ms: float
    samples: int
    calls: int
    host_ms: float
    host_bound: bool

    def as_row(self) -> dict[str, object]:
        return {
            "ms": self.ms,
            "p10_ms": self.p10_ms,
            "p90_ms": self.p90_ms,
            "n": self.samples,
            "calls_per_sample": self.calls,
            "host_ms": self.host_ms,
            "host_bound": self.host_bound,
        }


@dataclass(frozen=True)
class Limits:
    """How long to measure: until ``seconds`` are over, within the bounds on rounds."""

    seconds: float = 4.0
    least_rounds: int = 5
    most_rounds: int = 60
    warm_up_rounds: int = 2


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics: share 0 is the least, 1 the greatest."""
    if not values:
        raise ValueError("quantile of no values; measure at least one sample")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarise(samples: Sequence[Sample], calls: int) -> Stats:
    device = [sample.device_ms for sample in samples]
    return Stats(
        ms=quantile(device, 0.5),
        p10_ms=quantile(device, 0.1),
        p90_ms=quantile(device, 0.9),
        samples=len(samples),
        calls=calls,
        host_ms=quantile([sample.host_ms for sample in samples], 0.5),
        host_bound=2 * sum(sample.host_bound for sample in samples) > len(samples),
    )


class Timer(Protocol):
    def sample(self, calls: Sequence[Call]) -> Sample: ...


class WallTimer:
    """For the CPU, where a call is over when it returns."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def sample(self, calls: Sequence[Call]) -> Sample:
        begin = self._clock()
        kept = [call() for call in calls]
        ms = 1e3 * (self._clock() - begin) / len(calls)
        del kept
        return Sample(device_ms=ms, host_ms=ms)


class CudaTimer:
    """CUDA events on the current stream."""

    # No GPU's clock is above 3 GHz: a spin lasts at least as long as asked for.
    CYCLES_PER_MS = 3_000_000
    LONGEST_SPIN_MS = 100.0

    def __init__(self) -> None:
        self._spin_ms = 1.0
        self._spin = getattr(torch.cuda, "_sleep", None)

    def sample(self, calls: Sequence[Call]) -> Sample:
        before_ms = self._spin_ms
        first: Sample | None = None
        while True:
            taken = self._once(calls)
            if not taken.host_bound or self._spin_ms >= self.LONGEST_SPIN_MS or self._spin is None:
                return taken
            if first is not None:
                longer_ms = (taken.host_ms - first.host_ms) * len(calls)
                if longer_ms > 0.5 * (self._spin_ms - before_ms):
                    # The host waited for the spin: these calls wait for the device by themselves,
                    # and no spin gets ahead of them. The others needn't wait for a longer one.
                    self._spin_ms = before_ms
                    return first
            first = first or taken
            # As long as this queueing took, and half as much again.
            wanted = max(2 * self._spin_ms, 1.5 * taken.host_ms * len(calls))
            self._spin_ms = min(wanted, self.LONGEST_SPIN_MS)

    def _once(self, calls: Sequence[Call]) -> Sample:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if self._spin is not None:
            self._spin(int(self._spin_ms * self.CYCLES_PER_MS))
        begin.record()
        started = time.perf_counter()
        # Results live until the end, so that every call writes memory of its own.
        kept = [call() for call in calls]
        host_ms = 1e3 * (time.perf_counter() - started) / len(calls)
        ran_dry = begin.query()
        end.record()
        end.synchronize()
        del kept
        return Sample(begin.elapsed_time(end) / len(calls), host_ms, ran_dry)


def interleave(
    contestants: Mapping[str, Sequence[Call]],
    timer: Timer,
    limits: Limits,
    *,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Stats]:
    """Measure all contestants in rounds, each round in an order of its own.

    So a drift of the clocks meets all alike, and nobody always runs behind the same neighbour.
    """
    order = random.Random(seed)
    names = list(contestants)
    taken: dict[str, list[Sample]] = {name: [] for name in names}
    for _ in range(limits.warm_up_rounds):
        for name in names:
            timer.sample(contestants[name])
    until = clock() + limits.seconds
    for done in range(limits.most_rounds):
        if done >= limits.least_rounds and clock() >= until:
            break
        order.shuffle(names)
        for name in names:
            taken[name].append(timer.sample(contestants[name]))
    return {name: summarise(taken[name], len(contestants[name])) for name in contestants}
