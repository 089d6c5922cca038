"""``make_loader``: from a source and a plan to batches on the device, by DALI or by PIL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import torch

from fastbeit.batch import MimBatch
from fastbeit.data.backend import HW_DECODER_LOAD, choose_backend
from fastbeit.data.bad import BadSamples
from fastbeit.data.gather import Job
from fastbeit.data.header import DEFAULT_MAX_PIXELS
from fastbeit.data.order import BatchSchedule
from fastbeit.data.plan import PlanSpec
from fastbeit.data.reference import ReferenceWork, ViewBatch
from fastbeit.data.source import Source
from fastbeit.data.views import ViewSpec, finish_views
from fastbeit.data.workers import Places, WorkerPool

_MAX_WORKERS = 16


class Engine(Protocol):
    """Yields uint8 views in order; owns the processes behind them."""

    def __iter__(self) -> Iterator[ViewBatch]: ...

    def __next__(self) -> ViewBatch: ...

    def close(self) -> None: ...


class Loader:
    """An iterator of ``MimBatch``, one per micro-batch: step start_step micro 0, 1, ..., in order.

    Use it as a context manager, or call ``close()``: it ends the worker processes.

    Attributes:
        backend: "dali" or "reference".
        reason: one line: which backend, and why.
        bad: the bad samples so far.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        backend: str,
        reason: str,
        bad: BadSamples,
        views: ViewSpec,
        device: torch.device,
        dtype: torch.dtype,
        token_dtype: torch.dtype,
    ) -> None:
        self.backend = backend
        self.reason = reason
        self.bad = bad
        self._engine = engine
        self._views = views
        self._device = device
        self._dtypes = (dtype, token_dtype)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> MimBatch:
        """The next micro-batch.

        Raises:
            TooManyBadSamples: more bad samples than allowed.
            RuntimeError: a worker process died.
        """
        try:
            batch = next(self._engine)
            self.bad.add(batch.bad)
            if not batch.complete:
                raise self.bad.give_up()
        except BaseException:
            self.close()
            raise
        images, token_images = finish_views(
            batch.images, batch.token_images, self._views, self._device, *self._dtypes
        )
        drop_scale = batch.drop_scale
        return MimBatch(
            images=images,
            token_images=token_images,
            positions=batch.positions.to(self._device, non_blocking=True),
            drop_scale=None
            if drop_scale is None
            else drop_scale.to(self._device, non_blocking=True),
            index=batch.index,
        )

    def close(self) -> None:
        """End the worker processes. Iterating is over after that."""
        self._engine.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def make_loader(
    source: Source,
    plan: PlanSpec,
    views: ViewSpec,
    schedule: BatchSchedule,
    *,
    seed: int,
    start_step: int = 0,
    total_steps: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    backend: Literal["auto", "dali", "reference"] = "auto",
    workers: int | None = None,
    prefetch: int = 2,
    hw_decoder_load: float = HW_DECODER_LOAD,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    token_dtype: torch.dtype = torch.float32,
    bad_log: Path | None = None,
    max_bad_fraction: float = 0.01,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Loader:
    """A loader of this rank's micro-batches from ``start_step`` to ``total_steps``.

    Every batch is a pure function of (source, plan, views, schedule, seed, step, micro-batch): the
    number of workers and the step at which a run starts change nothing.

    Args:
        source: encoded images.
        plan: what is drawn for each.
        views: sizes and ranges of both views.
        schedule: which samples make up a step.
        seed: of the plan; the order has the schedule's.
        start_step, total_steps: first step, and the one after the last.
        accumulation: micro-batches per step and rank.
        rank, world_size: this process's place among the data-parallel ranks.
        backend: "auto" takes DALI on a CUDA device if it is there, else PIL, and says so in
            ``reason``; "dali" and "reference" are used or are an error.
        workers: processes that read (and, for PIL, decode); 0: none, all happens in this process;
            None: by the cores there are for a rank. With DALI also its number of threads.
        prefetch: micro-batches that each worker (and DALI's pipeline) holds ready.
        hw_decoder_load: share of a batch's JPEGs that DALI leaves to the decoder of a GPU that has
            one (A100, H100 and their successors); without effect elsewhere.
        device: where the batches go.
        dtype: of the student's view; it is computed in float32.
        token_dtype: of the tokenizer's view. bfloat16 can't tell all 256 values of a pixel apart.
        bad_log: ``bad_samples.jsonl``, appended to.
        max_bad_fraction: share of the source's samples that may be bad (one always may be, unless
            it is 0).
        max_pixels: width x height above this is a bad sample.

    Raises:
        ValueError: arguments that don't fit together.
        RuntimeError: backend="dali" without a usable DALI; the message says what to install.
    """
    target = torch.device(device)
    if total_steps < start_step or start_step < 0:
        raise ValueError(
            f"steps must be 0 <= start_step <= total_steps, got {start_step} and {total_steps}"
        )
    if len(source) != schedule.num_samples:
        raise ValueError(
            f"the schedule is for {schedule.num_samples} samples, the source holds {len(source)}"
        )
    if prefetch < 1 or (workers is not None and workers < 0):
        raise ValueError(
            f"prefetch must be at least 1 and workers at least 0, got {prefetch} and {workers}"
        )
    if not 0.0 <= hw_decoder_load <= 1.0:
        raise ValueError(f"hw_decoder_load must be a share, 0 to 1, got {hw_decoder_load}")
    if workers is None:
        workers = default_workers(target, world_size)
    batch = schedule.micro_batch(accumulation=accumulation, world_size=world_size)
    chosen, reason = choose_backend(backend, target)
    bad = BadSamples(len(source), log=bad_log, max_fraction=max_bad_fraction, rank=rank)
    job = Job(
        source=source,
        plan=plan,
        views=views,
        schedule=schedule,
        seed=seed,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        max_pixels=max_pixels,
        bad_limit=bad.limit,
    )
    places = Places(start_step, total_steps, accumulation)
    needs_main = type(source).__module__ == "__main__"
    if chosen == "dali":
        from fastbeit.data.dali import DaliEngine

        engine: Engine = DaliEngine(
            job,
            places,
            workers=workers,
            prefetch=prefetch,
            device=target,
            hw_decoder_load=hw_decoder_load,
            needs_main=needs_main,
        )
    else:
        pixels = views.size[0] * views.size[1] + views.token_size[0] * views.token_size[1]
        engine = WorkerPool(
            ReferenceWork(job),
            places,
            workers=workers,
            prefetch=prefetch,
            pin_memory=target.type == "cuda",
            batch_bytes=batch * views.channels * pixels,
            needs_main=needs_main,
        )
    return Loader(
        engine,
        backend=chosen,
        reason=reason,
        bad=bad,
        views=views,
        device=target,
        dtype=dtype,
        token_dtype=token_dtype,
    )


def default_workers(device: torch.device, world_size: int = 1) -> int:
    """Worker processes of a rank: its share of the cores, less what training itself needs.

    On a GPU one core is left to the training process; on a CPU training needs the cores more than
    loading does, and a quarter is taken. A machine with a single core loads in the process itself.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    share = cores // max(1, ranks_here)
    if share < 2:
        return 0 if device.type == "cpu" else 1
    return min(_MAX_WORKERS, max(1, share // 4 if device.type == "cpu" else share - 1))
