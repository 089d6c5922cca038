"""A timer for pytest-benchmark that stands still where the work is not what is measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class PartClock:
    """Wall seconds, but for those left out.

    CLOCK = PartClock()

    @pytest.mark.benchmark(timer=CLOCK)
    def test_stall(benchmark): ...  # what runs within CLOCK.outside() isn't counted
    """

    def __init__(self) -> None:
        self.__name__ = "part of perf_counter"
        self._left_out_s = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self._left_out_s

    def leave_out(self, seconds: float) -> None:
        """Take back seconds that have passed."""
        self._left_out_s += seconds

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.leave_out(time.perf_counter() - began_s)
