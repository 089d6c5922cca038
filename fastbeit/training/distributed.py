"""Processes, devices, and how FSDP2 spreads the model over them.

One process drives one device. Several ranks go through ``fully_shard``: fp32 master weights, bf16
copies, gradients reduced in fp32. One rank does the same without it, to the bit (``one_device.py``;
docs/decisions/0010-one-device.md). Modes, for W ranks: ``none`` shards over 1 and copies over W;
``zero2`` and ``zero3`` shard over W, the latter freeing gathered parameters after each forward;
``hybrid`` shards inside a node and copies across nodes.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from fastbeit.training.one_device import WorkingWeights
from fastbeit.training.threads import settle_threads

TIMEOUT = timedelta(minutes=60)
"""Of every collective. A new group's default is 30 minutes, and the first indexing of a large data
set on rank 0 may take longer."""

BLOCKS_PER_UNIT = 3
"""Blocks gathered and reduced together: 85 M parameters in units of one block give messages too
small to fill a link, and one unit leaves nothing to overlap with."""


@dataclass(frozen=True)
class World:
    """Where this process stands among all ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup
    """A gloo group of its own for flags on the CPU; never used by FSDP or by checkpoints."""
    storage: dist.ProcessGroup
    """A gloo group of its own for checkpoints: on the training group their collectives would
    interleave with FSDP's."""
    threads_reason: str
    """Why a process on the CPU has so many threads; empty on a GPU."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank, on the CPU."""
        dist.barrier(self.control)


def pick_device(asked: str, local_rank: int) -> torch.device:
    """The device of this process. ``asked``: auto, cuda or cpu.

    Raises:
        ValueError: cuda asked for and absent, or fewer GPUs than processes on this machine.
    """
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "--device cuda was asked for, but PyTorch sees no CUDA GPU; run "
            "`python -m fastbeit.doctor` to see why, or use --device auto"
        )
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(
            f"this machine has {gpus} GPU(s) but more processes were started on it; start "
            f"torchrun with --nproc-per-node {gpus}"
        )
    return torch.device("cuda", local_rank)


def start(asked_device: str) -> World:
    """Join the other ranks (torchrun's environment), or be alone under plain ``python -m``."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(asked_device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Whoever asks for fp32 gets it: by default cuDNN rounds convolutions' factors to TF32.
        torch.backends.cudnn.allow_tf32 = False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        # torchrun keeps its store when it restarts a dead rank, with the addresses of the dead
        # processes in it; under a prefix for each attempt, ranks can't mistake them for their own.
        store, rank, size = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"attempt-{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=local_rank,
        local_size=local_size,
        device=device,
        control=_cpu_group(),
        storage=_cpu_group(),
        threads_reason=settle_threads(device, local_size),
    )


def _cpu_group() -> dist.ProcessGroup:
    """All ranks once more, on gloo."""
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def stop() -> None:
    """Leave the process group.

    Where an error is on its way out of one of several ranks, the process ends here, with its
    traceback and exit code 1: the others are in a collective, and leaving an NCCL group waits for
    them, before Python would print anything.
    """
    if not dist.is_initialized():
        return
    if isinstance(sys.exc_info()[1], Exception) and several_ranks():
        traceback.print_exc()
        leave(1)
    dist.destroy_process_group()


def several_ranks() -> bool:
    """Whether others are there, who may be in a collective."""
    return dist.is_initialized() and dist.get_world_size() > 1


def leave(code: int) -> NoReturn:
    """End this process with ``code``, without taking the interpreter down first.

    A gloo thread may still hold the last collective's tensors, and asks for the interpreter to free
    them; where that is being torn down, the process aborts (pytorch/pytorch#179291). A group lives
    on after :func:`stop` while anything refers to it, and DTensor's caches do. So whoever trained
    leaves by this, after closing what it opened: ``atexit`` handlers are not called.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def seed_everything(seed: int) -> None:
    """Seed the generators that nothing here draws from, in case a user's code does."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Placement(NamedTuple):
    """How a model lies on the ranks.

    copies: ranks that hold the same shard. weights: to be entered for each forward and backward
    pass.
    """

    copies: int
    weights: Callable[[], AbstractContextManager[None]]


def place_model(model: nn.Module, world: World, *, mode: str, precision: str) -> Placement:
    """Make ``model.loss`` run in ``precision`` from fp32 masters, spread over the ranks.

    Raises:
        ValueError: hybrid with another number of processes on every node.
    """
    if world.size == 1:
        table = getattr(model, "rel_pos", None)
        exact = () if table is None else (table,)
        return Placement(1, WorkingWeights(model, _low(precision), exact))
    mesh = make_mesh(world, mode)
    shard_model(model, mesh, mode=mode, precision=precision)
    copies = mesh["replicate"].size() if "replicate" in (mesh.mesh_dim_names or ()) else 1
    return Placement(copies, contextlib.nullcontext)


def _low(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def make_mesh(world: World, mode: str) -> DeviceMesh:
    """The mesh of a sharding mode; two-dimensional (replicate, shard) for none and hybrid."""
    names = ("replicate", "shard")
    match mode:
        case "none":
            return init_device_mesh(world.device.type, (world.size, 1), mesh_dim_names=names)
        case "zero2" | "zero3":
            return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
        case "hybrid":
            if world.size % world.local_size:
                raise ValueError(
                    f"--shard hybrid needs the same number of processes on every node; got "
                    f"{world.size} ranks with {world.local_size} on this one"
                )
            shape = (world.size // world.local_size, world.local_size)
            return init_device_mesh(world.device.type, shape, mesh_dim_names=names)
        case _:
            raise ValueError(f"shard must be none, zero2, zero3 or hybrid, got {mode!r}")


def shard_model(model: nn.Module, mesh: DeviceMesh, *, mode: str, precision: str) -> None:
    """Apply FSDP2 in place, so that ``model.loss`` runs in ``precision`` from fp32 masters.

    The relative-position table is a unit of its own, kept in fp32: in a bf16 unit both the bias and
    its gradient would be rounded without a word. For the same reason no unit casts its inputs. A
    table in each block (``relative_per_block``) belongs to its block's unit and is rounded like its
    weights.

    Compiled blocks and blocks under activation checkpointing come so to this function: checkpoint,
    compile, shard, in this order.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=_low(precision), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(
        param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    free_early = mode in {"zero3", "hybrid"}
    if (table := getattr(model, "rel_pos", None)) is not None:
        fully_shard(table, mesh=mesh, mp_policy=exact, reshard_after_forward=free_early)
    blocks = list(model.blocks)  # pyright: ignore[reportArgumentType]
    for start_block in range(0, len(blocks), BLOCKS_PER_UNIT):
        unit = blocks[start_block : start_block + BLOCKS_PER_UNIT]
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=free_early)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "loss")


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU, fp32, on every rank (a collective call)."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in model.state_dict().items()
    }
