"""Batches into the loop: their tokens ahead of time where asked for, the waiting measured."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbeit.batch import MimBatch
from fastbeit.tokenizer.tokenize_ahead import TokenizeAhead
from fastbeit.training import control
from fastbeit.training.step import phase

Encode = Callable[[MimBatch], Tensor]


def choose_ahead(asked: str, device: torch.device) -> tuple[bool, str]:
    """Whether the tokens of batch t + 1 are made beside step t, and why."""
    if device.type == "cpu":
        if asked == "on":
            raise ValueError(
                "--tokenize-ahead on needs a GPU: a CPU's cores are all at work on the step; use "
                "--tokenize-ahead auto"
            )
        return False, "the CPU has no idle units to overlap with"
    if asked == "auto":
        return False, "its gain is not measured yet; --tokenize-ahead on takes a stream of its own"
    return asked == "on", "asked for by name"


def _in_phase(encode: Encode) -> Encode:
    def tokenize(batch: MimBatch) -> Tensor:
        with phase("tokenize"):
            return encode(batch)

    return tokenize


class Feed:
    """Hands out a step's micro-batches, and measures how long the loop waited for them.

    Args:
        loader: of micro-batches.
        batches: how many the run will take; none is loaded beyond them.
        encode: makes tokens ahead of time; None: the step makes them.
        graph: replay ``encode`` as a CUDA graph.
    """

    def __init__(
        self,
        loader: Any,
        watchdog: control.Watchdog,
        device: torch.device,
        *,
        batches: int,
        encode: Encode | None = None,
        graph: bool = False,
    ) -> None:
        self.sample_ids: list[int] = []
        self._loader = loader
        self._watchdog = watchdog
        self._step = 0
        self._waited_s = 0.0
        self._batches = self._load(batches)
        if encode is not None:
            ahead = TokenizeAhead(self._batches, _in_phase(encode), device, graph=graph)
            self._batches = iter(ahead)

    def take(self, step: int, accumulation: int) -> Iterator[MimBatch]:
        """The micro-batches of one step, on the device."""
        self.sample_ids, self._step = [], step
        self._watchdog.at(step, "computing")  # ahead, the last step loads nothing
        for batch in itertools.islice(self._batches, accumulation):
            self.sample_ids += batch.index.tolist()
            yield batch

    def _load(self, batches: int) -> Iterator[MimBatch]:
        loaded = iter(self._loader)
        for _ in range(batches):
            self._watchdog.at(self._step, "loading")
            before_s = time.perf_counter()
            with phase("load"):
                batch = next(loaded)
            self._waited_s += time.perf_counter() - before_s
            self._watchdog.at(self._step, "computing")
            yield batch

    def read_waited_s(self) -> float:
        """Seconds waited since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def close(self) -> None:
        """Stop the loader's workers."""
        self._loader.close()
