"""Target tokens of the next batch while the current one trains.

    for batch in TokenizeAhead(loader, encode, device):
        ...  # with batch.targets

with ``encode = lambda batch: tokenizer.encode(batch.token_images, batch.positions)``. On a GPU the
next batch's tokens are queued on a stream of their own before this batch is handed out, so that the
tokenizer fills what the student's step leaves idle; ``graph=True`` replays it as one CUDA graph, a
single launch instead of some hundred. On a CPU, which has one set of cores, both are plain calls.

The GPU's part has not run on a GPU yet: its ordering is tested with stand-ins for streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastbeit.batch import MimBatch

Encode = Callable[[MimBatch], Tensor]
_READ = ("token_images", "positions")  # what ``encode`` may read of a batch
_WARM_UPS = 2  # before a capture: libraries choose algorithms and allocate workspaces


class _Queued(NamedTuple):
    batch: MimBatch
    targets: Tensor
    done: torch.cuda.Event | None


class TokenizeAhead:
    """Iterates over batches with targets; the tokens of one batch more are always under way.

    Args:
        batches: of the loader, on ``device``. One batch more than has been handed out is taken from
            it; an error it raises comes after the batches before it.
        encode: tokens of a batch, from its ``token_images`` and ``positions`` alone, without host
            syncs; runs with the side stream current.
        device: of the batches and the tokenizer.
        graph: capture ``encode`` in a CUDA graph at the first batch. Batches of other shapes (the
            last one) run without it. The tokenizer's weights must stay where they are.
    """

    def __init__(
        self,
        batches: Iterable[MimBatch],
        encode: Encode,
        device: torch.device | str,
        *,
        graph: bool = False,
    ) -> None:
        self._batches = batches
        self._device = torch.device(device)
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._encode = GraphedEncode(encode) if graph and self._side is not None else encode

    def __iter__(self) -> Iterator[MimBatch]:
        batches = iter(self._batches)
        ahead: _Queued | None = None
        error: Exception | None = None
        while True:
            following: _Queued | None = None
            try:
                following = self._queue(next(batches))
            except StopIteration:
                pass
            except Exception as caught:  # told once the batch before it has been trained on
                error = caught
            if ahead is not None:
                yield replace(ahead.batch, targets=self._take(ahead))
            if error is not None:
                raise error
            if following is None:
                return
            ahead = following

    def _queue(self, batch: MimBatch) -> _Queued:
        if self._side is None:
            return _Queued(batch, self._encode(batch), None)
        # All that is queued so far: what made the batch, and the steps of batches handed out. The
        # step of the one that is handed out next is not among them: with it these tokens overlap.
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            targets = self._encode(batch)
        for tensor in (batch.token_images, batch.positions):
            # Freed by its last holder, its memory is not to be given away before the side stream
            # has read it.
            tensor.record_stream(self._side)
        done = torch.cuda.Event()
        done.record(self._side)
        return _Queued(batch, targets, done)

    def _take(self, queued: _Queued) -> Tensor:
        if queued.done is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(queued.done)  # on the GPU; the host goes on
            queued.targets.record_stream(current)
        return queued.targets


class GraphedEncode:
    """``encode`` as a CUDA graph of the first batch's shapes: copy in, replay, copy the tokens out.

    The copies are what lets one graph serve batches that overlap: 9.6 MB of pixels in 16 bits for
    128 images, and 77 KB of tokens. Called with one and the same side stream current.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: MimBatch | None = None
        self._tokens: Tensor | None = None

    def __call__(self, batch: MimBatch) -> Tensor:
        if self._graph is None:
            self._capture(batch)
        assert self._graph is not None and self._inputs is not None and self._tokens is not None
        pairs = [(getattr(self._inputs, name), getattr(batch, name)) for name in _READ]
        if any(kept.shape != new.shape or kept.dtype != new.dtype for kept, new in pairs):
            return self._encode(batch)
        for kept, new in pairs:
            kept.copy_(new)
        self._graph.replay()
        return self._tokens.clone()

    def _capture(self, batch: MimBatch) -> None:
        copies = {name: getattr(batch, name).clone() for name in _READ}
        images = copies["token_images"]  # the student's are not read, and need not be kept alive
        self._inputs = MimBatch(images, drop_scale=None, index=batch.index, **copies)
        for _ in range(_WARM_UPS):
            self._encode(self._inputs)
        self._graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's may allocate meanwhile.
        with torch.cuda.graph(
            self._graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            self._tokens = self._encode(self._inputs)
