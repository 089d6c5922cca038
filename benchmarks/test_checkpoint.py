"""Checkpoints of ViT-B with AdamW's state: how long training stalls, until published, to resume.

    pytest benchmarks/test_checkpoint.py --benchmark-only

The reference is ``torch.save`` of the same tensors to one file, made durable too, during which
training waits. What comes back is compared to the bit before anything is timed. Files go to memory
(/dev/shm, where there is one), so that the code is measured and no disk of the day; the environment
variable FASTBEIT_BENCH_STORAGE names a folder of the storage to measure instead. ``mb_per_s`` is
what a small file was written durably at, there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.steps import optimizer_steps
from benchmarks.steps.clock import PartClock
from benchmarks.steps.optimizer_steps import OPTIMIZER
from benchmarks.steps.problem import SEED, Problem, base_for
from benchmarks.steps.stores import Checkpoints, OneFile, Store, write_rate
from benchmarks.suite import DEVICE, measure
from fastbeit.training.distributed import World
from fastbeit.training.optimizer import build_optimizer, optimizer_tensors

STORAGE_VARIABLE = "FASTBEIT_BENCH_STORAGE"
SHARED_MEMORY = Path("/dev/shm")
CLOCK = PartClock()


@dataclass(frozen=True)
class Place:
    """Where files go, and what is known of it."""

    folder: Path
    storage: str
    mb_per_s: float


def training_state(problem: Problem, device: torch.device) -> dict[str, Tensor]:
    """Weights and both moments, all random."""
    model = problem.student().to(device)
    optimizer = build_optimizer(model, OPTIMIZER)
    moments = optimizer_tensors(optimizer)
    generator = torch.Generator(device).manual_seed(SEED)
    for tensor in moments.values():
        tensor.normal_(generator=generator)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    return {**weights, **{f"optimizer.{name}": value for name, value in moments.items()}}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with optimizer_steps.one_process() as found:
        yield found


@pytest.fixture(scope="module")
def state(world: World) -> dict[str, Tensor]:
    return training_state(base_for(DEVICE), world.device)


@pytest.fixture(scope="module")
def place(state: dict[str, Tensor]) -> Iterator[Place]:
    """A temporary folder on the storage that is measured."""
    parent = os.environ.get(STORAGE_VARIABLE)
    storage = "temporary folder" if parent is None else "named folder"
    if parent is None and SHARED_MEMORY.is_dir():
        # Each path keeps a checkpoint and writes the next one beside it.
        if shutil.disk_usage(SHARED_MEMORY).free > 4 * size_of(state):
            parent, storage = str(SHARED_MEMORY), "memory"
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Place(Path(folder), storage, write_rate(Path(folder)) / 1e6)


@pytest.fixture(scope="module")
def stores(state: dict[str, Tensor], place: Place, world: World) -> dict[str, Store]:
    folders = {name: place.folder / name for name in ("reference", "fast")}
    for folder in folders.values():
        folder.mkdir()
    return {
        "reference": OneFile(folders["reference"], state),
        "fast": Checkpoints(folders["fast"], state, world),
    }


def size_of(state: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def assert_comes_back(store: Store, state: dict[str, Tensor]) -> None:
    """Saved, changed while the files are written, and read: the bits of before."""
    before = {name: tensor.clone() for name, tensor in state.items()}
    store.save()
    for tensor in state.values():
        tensor.zero_()
    store.wait()
    store.load()
    wrong = [name for name, tensor in state.items() if not torch.equal(tensor, before[name])]
    assert not wrong, f"{len(wrong)} tensors come back otherwise: {wrong[:3]}"


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("part", ["stall", "published", "resume"])
def test_checkpoint(
    benchmark: Any,
    state: dict[str, Tensor],
    place: Place,
    stores: dict[str, Store],
    part: str,
    path: str,
) -> None:
    """stall: until training may go on. published: until the save has taken its place."""
    store = stores[path]

    def run() -> None:
        if part == "resume":
            return store.load()
        store.save()
        if part == "published":
            return store.wait()
        with CLOCK.outside():
            store.wait()

    measure(
        benchmark,
        run,
        suite="checkpoint",
        part=part,
        path=path,
        # The store of a path is the same for all parts: compared in the first.
        check=(lambda: assert_comes_back(store, state)) if part == "stall" else None,
        rounds=3,
        warmup=0,
        model=base_for(DEVICE).name,
        storage=place.storage,
    )
    # Not as `work`: the limit of that is what memory copies, and this goes to a storage.
    benchmark.extra_info.update(mb_per_s=place.mb_per_s, state_bytes=size_of(state))
