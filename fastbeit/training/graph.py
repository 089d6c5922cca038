"""An optimizer step as CUDA graphs: on one GPU all its launches become two.

    runner = GraphedStep(TrainStep(...))
    result = runner.run(micro_batches, accumulation)

The first steps run eagerly: libraries choose algorithms, kernels compile, AdamW makes its state.
Then a micro-batch's forward and backward pass is captured, another time for the micro-batches that
add to gradients which are there already, and the update; from then on a step copies its inputs to
where the graphs read them and replays these. Tokens and their statistics stay outside: tokens of
the next batch may be under way (``--tokenize-ahead``).

The learning rate must be a tensor, which graphs read anew (``optimizer.make_capturable``); every
other number of a step is one already. With several ranks FSDP2's collectives on streams of its own
would have to be captured too: not built.

This has not run on a GPU yet: its bookkeeping is tested with a stand-in that records operations and
runs them again on the same memory, as a replay does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from fastbeit.batch import MimBatch
from fastbeit.training.distributed import World
from fastbeit.training.step import StepResult, TrainStep

WARM_UPS = 3
"""Eager steps before the capture: libraries choose and allocate in the first, AdamW makes its state
at its end, and the allocator has settled by the third."""

_READ = ("images", "positions", "drop_scale", "targets")  # what a step reads of a batch


def choose_graph(asked: str, world: World, optimizer: str) -> tuple[bool, str]:
    """Whether the step is replayed as CUDA graphs, and why.

    Raises:
        ValueError: ``--cuda-graph on`` where it can't be.
    """
    unfit = None
    if world.device.type != "cuda":
        unfit = "the step runs on the CPU"
    elif world.size > 1:
        unfit = f"there are {world.size} ranks, and FSDP2's collectives are not captured"
    elif optimizer != "adamw":
        unfit = f"--optimizer {optimizer} reads back on the host"
    if asked == "on":
        if unfit is not None:
            raise ValueError(f"--cuda-graph on: {unfit}; use --cuda-graph auto")
        return True, "asked for by name"
    if asked == "off":
        return False, "asked for by name"
    return unfit is None, unfit or "measured faster on one GPU, and equal to the bit"


class GraphedStep:
    """Runs a :class:`~fastbeit.training.step.TrainStep`, from the fourth step on by replays.

    Args:
        step: on one CUDA device, not sharded; its optimizer capturable, its gradients none.

    Raises:
        RuntimeError: in :meth:`run`, where something in the step can't be captured.
    """

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        device = step.world.device
        self._stream = torch.cuda.Stream(device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._seen = 0
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._inputs: MimBatch | None = None
        self._result: StepResult | None = None

    def run(self, micro_batches: Iterable[MimBatch], accumulation: int) -> StepResult:
        """One update from ``accumulation`` micro-batches, all of one shape."""
        self._seen += 1
        if self._seen <= WARM_UPS:
            return self._eagerly(micro_batches, accumulation)
        for number, batch in enumerate(micro_batches):
            batch = replace(batch, targets=self._step.targets(batch))
            if not self._graphs:
                self._capture(batch, accumulation)
            self._put(batch)
            self._graphs["add" if number else "start"].replay()
        self._graphs["update"].replay()
        assert self._result is not None
        # The next replay writes over them.
        return StepResult(*(value.clone() for value in self._result))

    def _eagerly(self, micro_batches: Iterable[MimBatch], accumulation: int) -> StepResult:
        """On the stream of the capture: autograd accumulates where a gradient was first made."""
        current = torch.cuda.current_stream(self._step.world.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._step.run(micro_batches, accumulation)
        current.wait_stream(self._stream)
        return result

    def _capture(self, batch: MimBatch, accumulation: int) -> None:
        step = self._step
        copies = {
            name: None if (value := getattr(batch, name)) is None else value.clone()
            for name in _READ
        }
        # What a step doesn't read need not be kept alive.
        nothing = batch.token_images.new_empty(0)
        inputs = self._inputs = replace(batch, token_images=nothing, **copies)
        assert inputs.targets is not None
        pool = torch.cuda.graph_pool_handle()

        def record(name: str) -> torch.cuda.graph:
            self._graphs[name] = torch.cuda.CUDAGraph()
            # Of this thread alone: the loader's may allocate meanwhile. One pool for all: they run
            # one after another in the order of their capture, and gradients pass between them.
            return torch.cuda.graph(
                self._graphs[name],
                pool=pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            )

        try:
            with record("start"):
                self._sums.copy_(step.backward(inputs, inputs.targets, last=accumulation == 1))
            if accumulation > 1:
                with record("add"):
                    self._sums.add_(step.backward(inputs, inputs.targets, last=True))
            with record("update"):
                self._result = step.update(self._sums)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "the step could not be captured as a CUDA graph; --cuda-graph off runs it without"
            ) from error

    def _put(self, batch: MimBatch) -> None:
        assert self._inputs is not None
        for name in _READ:
            kept: Tensor | None = getattr(self._inputs, name)
            new: Tensor | None = getattr(batch, name)
            if kept is None or new is None:
                if kept is not new:
                    raise ValueError(f"{name} was {_told(kept)} at the capture, is {_told(new)}")
            elif (kept.shape, kept.dtype) != (new.shape, new.dtype):
                raise ValueError(
                    f"every micro-batch must be like the captured one: {name} was {_told(kept)}, "
                    f"is {_told(new)}"
                )
            else:
                kept.copy_(new)


def _told(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
