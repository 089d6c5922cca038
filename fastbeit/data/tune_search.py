"""Which loader settings give most images per second: measuring one, and searching among them.

The search goes along one axis at a time (workers, batches ahead, the hardware decoder's share) with
the others held, until once around changes nothing. On an axis the new values and the one in hand
are measured once a round, in turn, so that what else the machine does falls on all alike; the
medians decide, and a value has to be better by more than a margin to replace the one in hand. When
the time is over, what was measured counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from fastbeit.data.loader import Loader

CLOSE = 1.25
"""Loaders further apart than that are not measured against each other once more."""
MARGIN = 1.02
"""How much better a setting has to be: below that it is the spread of short measurements."""
MIN_BATCHES = 3


@dataclass(frozen=True)
class Setting:
    """What is tuned."""

    loader: str
    workers: int
    prefetch: int
    hw_decoder_load: float | None = None
    """None where there is no hardware decoder, or PIL decodes."""

    def flags(self) -> str:
        """For ``fastbeit.pretrain``."""
        words = f"--loader {self.loader} --workers {self.workers} --prefetch {self.prefetch}"
        if self.hw_decoder_load is not None:
            words += f" --hw-decoder-load {self.hw_decoder_load:g}"
        return words


@dataclass(frozen=True)
class Axes:
    """The values to try, and where to start."""

    start: Setting
    workers: Sequence[int]
    prefetch: Sequence[int]
    hw_decoder_load: Sequence[float] = ()

    def along(self, name: str, setting: Setting) -> list[Setting]:
        """``setting`` with every value of one axis, its own among them."""
        values = {getattr(setting, name), *getattr(self, name)}
        return [replace(setting, **{name: value}) for value in sorted(values)]

    @property
    def names(self) -> list[str]:
        """Axes that have something to try."""
        names = ("workers", "prefetch", "hw_decoder_load")
        return [name for name in names if getattr(self, name)]


Measure = Callable[[Setting], float]
"""Images per second of a setting, measured once."""


@dataclass
class Search:
    """What was measured so far. Where a loader starts is measured however little time there is."""

    measure: Measure
    rounds: int
    ends_s: float
    """``time.monotonic()`` after which nothing more is started."""
    rates: dict[Setting, list[float]] = field(default_factory=dict)
    cut_short: bool = False

    def rate(self, setting: Setting) -> float:
        """The median of all its measurements."""
        return median(self.rates[setting])

    def run(self, axes: Axes) -> Setting:
        """Coordinate descent from ``axes.start``; the setting that it ends on.

        A search of its own: that an earlier one ran out of time doesn't end it.
        """
        earlier, self.cut_short = self.cut_short, False
        try:
            return self._descend(axes)
        finally:
            self.cut_short |= earlier

    def _descend(self, axes: Axes) -> Setting:
        here = axes.start
        while True:
            before = here
            for name in axes.names:
                new = [s for s in axes.along(name, here) if s not in self.rates and s != here]
                if new or here not in self.rates:
                    here = self.fastest([here, *new])
            if here == before or self.cut_short:
                return here

    def duel(self, ends: Sequence[Setting]) -> Setting:
        """The fastest of several searches' ends; those that are close in turn once more."""
        best = max(ends, key=self.rate)
        close = [setting for setting in ends if CLOSE * self.rate(setting) >= self.rate(best)]
        return self.fastest(close) if len(close) > 1 else best

    def fastest(self, settings: Sequence[Setting]) -> Setting:
        """The fastest of ``settings``, measured in turn; the first unless another beats it."""
        fresh: dict[Setting, list[float]] = {}
        for _ in range(self.rounds):
            for setting in settings:
                known = any(other.loader == setting.loader for other in self.rates)
                if known and time.monotonic() >= self.ends_s:
                    self.cut_short = True
                    break
                rate = self.measure(setting)
                fresh.setdefault(setting, []).append(rate)
                self.rates.setdefault(setting, []).append(rate)
        if settings[0] not in fresh:  # the time was over before
            return settings[0]
        best = max(fresh, key=lambda setting: median(fresh[setting]))
        better = median(fresh[best]) > MARGIN * median(fresh[settings[0]])
        return best if better else settings[0]


def loader_rate(
    open_loader: Callable[[Setting], Loader], setting: Setting, seconds: float
) -> float:
    """Images per second that a loader gives when nothing but the clock takes its batches.

    What was ready before the clock starts is no rate, so as many batches are dropped first as
    workers and queues hold; fewer where that takes longer than ``seconds``, for then they were
    waited for. Workers give batches in bursts: two of each are awaited at least. On a GPU the
    batches are, too, as a step would.
    """
    with open_loader(setting) as loader:
        device = next(loader).images.device
        began_s = time.perf_counter()
        for _ in range(setting.prefetch * (max(1, setting.workers) + 1)):
            next(loader)
            if time.perf_counter() - began_s > seconds:
                break
        _settle(device)
        images, batches, least = 0, 0, max(MIN_BATCHES, 2 * setting.workers)
        began_s = time.perf_counter()
        while batches < least or time.perf_counter() - began_s < seconds:
            images += len(next(loader))
            batches += 1
        _settle(device)
        return images / (time.perf_counter() - began_s)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def counts_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``."""
    powers = [2**power for power in range(most.bit_length())]
    return sorted({*powers, most}) if most else []


def has_hardware_decoder(device: torch.device) -> bool:
    """Whether a GPU has a JPEG decoder of its own: A100 and A30, H100 and H200, B200 and B300.

    NVIDIA's data-centre GPUs with HBM have, by compute capability; others with one would be left
    out here, which costs them the sweep and nothing else.
    """
    if device.type != "cuda":
        return False
    capability: Any = torch.cuda.get_device_capability(device)
    return capability in {(8, 0), (9, 0), (10, 0), (10, 3)}
