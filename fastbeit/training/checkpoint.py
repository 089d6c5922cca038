"""Checkpoints for resuming: asynchronous, atomic, and exact.

``checkpoints/step-00001000/`` holds what ``torch.distributed.checkpoint`` wrote (model, optimizer,
statistics, RNG; every rank its shards) and ``state.json`` (step, configuration, data fingerprint).
A save copies the state to host memory, then writes in the background into ``step-….writing`` on a
process group of its own. Only when every rank's files are on disk does rank 0 rename the folder and
then move ``checkpoints/latest``, so a kill, a full disk or a lost node leaves the previous one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from fastbeit.training.checkpoint_index import (
    cause,
    check_index,
    check_sums,
    complete_checkpoints,
)
from fastbeit.training.distributed import World

STATE_FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint found on disk."""

    path: Path
    step: int
    state: dict[str, Any]


def find_latest(folder: Path) -> Saved | None:
    """The checkpoint that ``latest`` names, or None where none was ever completed.

    Raises:
        ValueError: ``latest`` names something that is not a complete checkpoint.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    path = folder / (pointer.read_text(encoding="utf-8").strip() or "(empty)")
    try:
        return read_saved(path)
    except ValueError as error:
        others = [p.name for p in complete_checkpoints(folder) if p != path]
        if not others:
            raise
        raise ValueError(
            f"{error}. {pointer} can name another one, as it stands: {', '.join(others)}"
        ) from error


def read_saved(path: Path) -> Saved:
    """The checkpoint in ``path``; ValueError where it is none."""
    advice = "pass another run folder, or remove it to start afresh"
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        step = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a complete checkpoint ({type(error).__name__}: {error}); {advice}"
        ) from error
    if state.get("format") != STATE_FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {state.get('format')!r}, this version reads "
            f"{STATE_FORMAT}; {advice}"
        )
    if not (path / ".metadata").is_file():
        raise ValueError(f"{path} has a state.json but no tensors (.metadata is missing); {advice}")
    return Saved(path, step, state)


class Checkpointer:
    """Writes checkpoints in the background and keeps the newest few.

    Args:
        folder: ``RUN_DIR/checkpoints``, shared by all ranks.
        world: the ranks.
        keep: checkpoints to keep.
    """

    def __init__(self, folder: Path, world: World, *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints must be at least 1, got {keep}")
        self.folder = folder
        self.world = world
        self.keep = keep
        self._running: tuple[Future[Any], int, dict[str, Any]] | None = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("step-*.writing"):
                shutil.rmtree(leftover)  # of a run that was killed mid-save
        world.barrier()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Start saving; returns once the tensors are copied, so training may change them.

        Waits for the save before it, if that is still running. Should that one have failed, its
        OSError is raised only after this one was started: the failure may be known to one rank
        alone, and starting is a collective call.
        """
        failure = None
        try:
            self.wait()
        except OSError as error:
            failure = error
        writing = self.folder / f"step-{step:08d}.writing"
        future = dcp.async_save(
            dict(tensors), checkpoint_id=writing, process_group=self.world.storage
        )
        assert isinstance(future, Future)
        self._running = (future, step, {**state, "format": STATE_FORMAT, "step": step})
        if failure is not None:
            raise failure

    def poll(self) -> int | None:
        """Publish a save that has finished since; its step, or None. Never waits."""
        if self._running is None or not self._running[0].done():
            return None
        return self.wait()

    def wait(self) -> int | None:
        """Wait for the running save and publish it; its step, or None where none was running.

        Raises:
            OSError: the files could not be written (disk full, no permission). The checkpoint
                before it is untouched.
        """
        if self._running is None:
            return None
        future, step, state = self._running
        self._running = None
        writing = self.folder / f"step-{step:08d}.writing"
        try:
            future.result()
            if self.world.is_main:
                self._publish(writing, step, state)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            if self.world.is_main:
                shutil.rmtree(writing, ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder}: "
                f"{cause(error)} ({_free_bytes(self.folder) / 2**20:.0f} MiB are free there); the "
                "one before it is intact"
            ) from error
        return step

    def _publish(self, writing: Path, step: int, state: dict[str, Any]) -> None:
        final = self.folder / f"step-{step:08d}"
        write_durably(writing / "state.json", json.dumps(state, indent=1))
        if final.exists():  # saved again at the same step after a resume: never without a whole one
            aside = final.with_suffix(".old.writing")
            os.replace(final, aside)
            os.replace(writing, final)
            shutil.rmtree(aside)
        else:
            os.replace(writing, final)
        _sync_folder(self.folder)
        write_durably(self.folder / "latest", final.name + "\n")
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            if old != final:
                shutil.rmtree(old)


def load_tensors(saved: Saved, tensors: Mapping[str, Tensor], world: World) -> None:
    """Read a checkpoint into ``tensors`` in place; any number of ranks, any sharding.

    Raises:
        ValueError: the checkpoint lacks a tensor, holds it in another shape, or its index names
            anything but tensors.
    """
    index = check_index(saved.path / ".metadata")
    check_sums(saved.path, index, world)
    try:
        dcp.load(dict(tensors), checkpoint_id=saved.path, process_group=world.storage)
    except (Exception, CheckpointException) as error:
        raise ValueError(
            f"{saved.path} does not fit this model or is damaged: {cause(error)}; resume with the "
            "configuration it was written with, or start in another run folder"
        ) from error


def rng_tensors(world: World) -> dict[str, Tensor]:
    """This rank's generator states, as tensors named by rank."""
    states = {f"rng.{world.rank}.cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"rng.{world.rank}.cuda"] = torch.cuda.get_rng_state(world.device)
    return states


def restore_rng(states: Mapping[str, Tensor], world: World) -> None:
    """Set this rank's generators from :func:`rng_tensors` of the same rank."""
    torch.set_rng_state(states[f"rng.{world.rank}.cpu"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"rng.{world.rank}.cuda"], world.device)


def write_durably(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` at once: readers see the old file or the new one, whole."""
    # Of this process alone: two ranks may record why they end in the same instant.
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.new")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_bytes(folder: Path) -> int:
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize
