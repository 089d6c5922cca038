"""Worker processes: micro-batches made ahead of time, in order, without surprises.

PyTorch's ``DataLoader`` moves the data; this module settles what it leaves open:

- Workers come from a fork server, never from a fork of this process, which may hold gloo threads,
  DALI threads or a CUDA context. The server imports the loader once; a worker then starts in
  milliseconds, and the training script is not imported again.
- A signal to the whole process group or job step (Ctrl-C, SIGTERM, SIGUSR1) reaches workers too.
  They ignore it: the training process decides what happens, and needs them until its last step.
  They end when it closes them, terminates them or dies.
- The random generators of the training process are not touched.
- Where /dev/shm is too small (containers default to 64 MB), batches go through pipes.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = TypeVar("Batch", bound=tuple)
_PRELOAD = ["fastbeit.data.loader"]
_SIGNALS = {
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
}


class Stopped(Exception):
    """A worker gives up its batch because the loader is closing."""


@dataclass(frozen=True)
class Places(Sampler[tuple[int, int]]):
    """The (step, micro-batch) pairs of a run, in order."""

    start_step: int
    total_steps: int
    accumulation: int

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.start_step, self.total_steps):
            for micro in range(self.accumulation):
                yield step, micro


class _Batches(Dataset[Any]):
    """What runs in a worker: ``work(step, micro, poll)``; ``poll`` raises Stopped on closing."""

    def __init__(self, work: Callable[..., tuple], stop: Any, shared_memory: bool) -> None:
        self._work, self._stop, self._shared_memory = work, stop, shared_memory

    def __getitem__(self, place: tuple[int, int]) -> tuple:
        batch = self._work(*place, poll=self._poll)
        return batch if self._shared_memory else _convert(batch, torch.Tensor, torch.Tensor.numpy)

    def _poll(self) -> None:
        if self._stop is not None and self._stop.value:
            raise Stopped


class WorkerPool(Generic[Batch]):
    """Iterates over the batches that ``work`` makes for ``places``.

    Args:
        work: picklable; ``work(step, micro, poll=...)`` returns a NamedTuple of tensors and plain
            values.
        places: which batches.
        workers: processes; 0 makes batches in this process, when they are asked for.
        prefetch: batches that each worker holds ready.
        pin_memory: tensors come in page-locked memory, for fast copies to a CUDA device.
        batch_bytes: size of a batch, to compare with the shared memory there is.
        needs_main: the source's class lives in the training script, so workers must import it.
    """

    def __init__(
        self,
        work: Callable[..., Batch],
        places: Places,
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        batch_bytes: int,
        needs_main: bool = False,
    ) -> None:
        self._pin_memory = pin_memory
        self._stop = None
        if workers == 0:
            self._iterator: Iterator[Any] = iter(
                DataLoader(
                    _Batches(work, None, True),
                    batch_size=None,
                    sampler=places,
                    collate_fn=_as_is,
                    pin_memory=pin_memory,
                    generator=torch.Generator(),
                )
            )
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._stop = context.RawValue(ctypes.c_bool, False)
        shared_memory = _shared_memory_holds(batch_bytes * (workers * prefetch + 2))
        with warnings.catch_warnings(), _signals_held(), _main_hidden(not needs_main):
            # DataLoader warns of more workers than cores; the number is the caller's choice.
            warnings.simplefilter("ignore")
            self._iterator = iter(
                DataLoader(
                    _Batches(work, self._stop, shared_memory),
                    batch_size=None,
                    sampler=places,
                    collate_fn=_as_is,
                    num_workers=workers,
                    prefetch_factor=prefetch,
                    pin_memory=pin_memory,
                    generator=torch.Generator(),  # a base seed is drawn: not from the global one
                    multiprocessing_context=context,
                    worker_init_fn=partial(_stand_by, os.getpid()),
                )
            )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = _convert(next(self._iterator), np.ndarray, torch.from_numpy)
        if self._pin_memory and torch.cuda.is_available():
            # Tensors are already; arrays, where shared memory is small, DataLoader leaves alone.
            batch = _convert(batch, torch.Tensor, torch.Tensor.pin_memory)
        return batch

    def close(self) -> None:
        """End the workers; what they had ready is dropped."""
        if self._stop is not None:
            self._stop.value = True
        # The iterator shuts its workers down when its last reference goes.
        self._iterator = iter(())


def _as_is(batch: Any) -> Any:
    return batch


def _convert(batch: Batch, kind: type, change: Callable[[Any], Any]) -> Batch:
    """The same NamedTuple with every value of type ``kind`` changed."""
    return type(batch)(*(change(v) if isinstance(v, kind) else v for v in batch))


def _shared_memory_holds(needed_bytes: int) -> bool:
    try:
        free = os.statvfs("/dev/shm")
    except OSError:
        return True  # no such file system: PyTorch keeps shared memory elsewhere
    return free.f_bavail * free.f_frsize > needed_bytes


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started inside inherit the signals as blocked: the fork server, and its workers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        resource_tracker.ensure_running()  # its start unblocks SIGINT and SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_hidden(hide: bool) -> Iterator[None]:
    """Keep child processes from importing the training script, which they have no use for."""
    main = sys.modules["__main__"]
    if hide:
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _stand_by(main_pid: int, worker_id: int) -> None:
    """In a worker: end with the training process, and ignore signals from anybody else."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    for number in _SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: no way to see the sender
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_pid:
            pass
        os._exit(0)

    threading.Thread(target=watch, name="sigterm", daemon=True).start()


def _end_with_parent() -> None:
    """DataLoader watches the fork server instead, which lives as long as any of its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when the training process is gone, even by SIGKILL
        os._exit(1)
