"""Ways to keep a training state: the run's own checkpoints, and ``torch.save`` as everybody has it.

Both make a save durable (``fsync``) before it takes its place, and both read into the live tensors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastbeit.training import checkpoint
from fastbeit.training.distributed import World

Tensors = Mapping[str, Tensor]
PROBE_BYTES = 32 << 20


class Store(Protocol):
    def save(self) -> None:
        """Return as soon as training may go on."""
        ...

    def wait(self) -> None:
        """Return when the save has taken its place."""
        ...

    def load(self) -> None:
        """Into the live tensors."""
        ...


class OneFile:
    """``torch.save`` of everything, training waiting meanwhile."""

    def __init__(self, folder: Path, tensors: Tensors) -> None:
        self.path = folder / "state.pt"
        self.tensors = tensors

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(dict(self.tensors), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)

    def wait(self) -> None:
        """It was saved at once."""

    def load(self) -> None:
        saved = torch.load(self.path, weights_only=True)
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[name])


class Checkpoints:
    """`fastbeit.training.checkpoint`: copied, then written in the background; read with its
    checks of the index and of every file's sum."""

    def __init__(self, folder: Path, tensors: Tensors, world: World) -> None:
        self.folder = folder
        self.tensors = tensors
        self.world = world
        self.saver = checkpoint.Checkpointer(folder, world, keep=1)
        self.step = 0

    def save(self) -> None:
        self.step += 1
        self.saver.save(self.step, self.tensors, {})

    def wait(self) -> None:
        self.saver.wait()

    def load(self) -> None:
        saved = checkpoint.find_latest(self.folder)
        assert saved is not None
        checkpoint.load_tensors(saved, self.tensors, self.world)


def write_rate(folder: Path) -> float:
    """Bytes a second that a small file takes to be durable in ``folder``."""
    path, data = folder / "probe", os.urandom(PROBE_BYTES)
    began_s = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    taken_s = time.perf_counter() - began_s
    path.unlink()
    return PROBE_BYTES / taken_s
