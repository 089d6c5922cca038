"""Counts the collectives of a real optimizer step, and writes them as JSON from rank 0.

    torchrun --nproc-per-node 2 collectives_worker.py OUT      over gloo, of the ranks started
    python collectives_worker.py OUT 64x8 512x8                of pretended worlds of RANKSxPER_NODE

In a pretended world this process is rank 0 and its collectives return at once: what FSDP2 calls,
and on how much, is real, what comes back is not.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbeit.batch import MimBatch
from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.training import distributed
from fastbeit.training.config import OptimizerConfig
from fastbeit.training.distributed import World
from fastbeit.training.optimizer import build_optimizer
from fastbeit.training.step import TrainStep

# Four blocks: units of three and one. No size is a multiple of 4 or 8: everything is padded.
CONFIG = BeitConfig(image_size=32, patch_size=8, width=42, depth=4, heads=3, vocab_size=51)
BATCH, SLOTS, ACCUMULATION = 2, 6, 2
KINDS = {
    "c10d._allgather_base_": "all_gather",
    "c10d._reduce_scatter_base_": "reduce_scatter",
    "c10d.allreduce_": "all_reduce",
}


class CollectiveCounter(TorchDispatchMode):
    """Counts (kind, bytes of the whole tensor, ranks); an unknown kind is a KeyError."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        if name.startswith("c10d."):
            leaves = tree_leaves(args)
            # A gather's output and a scatter's input are the whole tensor, the other is a part.
            whole = max(x.nbytes for x in leaves if isinstance(x, Tensor))
            boxed = [x for x in leaves if isinstance(x, torch.ScriptObject)]
            group = next(x for x in boxed if "ProcessGroup" in str(x._type()))
            ranks = dist.ProcessGroup.unbox(group).size()
            if ranks > 1:  # FSDP2 also calls some over a single rank
                self.calls[KINDS[name], whole, ranks] += 1
        return func(*args, **(kwargs or {}))


def step_collectives(world: World, mode: str, precision: str) -> list[Any]:
    model = BeitForMim(CONFIG, seed=0)
    mesh = distributed.make_mesh(world, mode)
    distributed.shard_model(model, mesh, mode=mode, precision=precision)
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(world.rank))
    if precision == "bf16":
        images = images.bfloat16()
    positions = torch.arange(SLOTS, dtype=torch.int32).expand(BATCH, -1)
    targets = torch.zeros(BATCH, SLOTS, dtype=torch.int64)
    runner = TrainStep(
        model,
        build_optimizer(model, OptimizerConfig()),
        lambda batch: targets,
        world,
        slots=world.size * ACCUMULATION * BATCH * SLOTS,
        clip_norm=3.0,
        copies=1,
    )
    batch = MimBatch(images, images, positions, None, torch.arange(BATCH))
    with CollectiveCounter() as counter:
        runner.run([batch] * ACCUMULATION, ACCUMULATION)
    return sorted([*call, count] for call, count in counter.calls.items())


def pretended(ranks: int, per_node: int) -> World:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    group: Any = dist.group.WORLD
    return World(0, ranks, 0, per_node, torch.device("cpu"), group, group, "")


def main(out: Path, worlds: list[str]) -> None:
    found = {}
    if not worlds:
        world = distributed.start("cpu")
        for case in ("none fp32", "zero2 bf16", "zero3 fp32", "zero3 bf16"):
            found[case] = step_collectives(world, *case.split())
        if world.is_main:
            out.write_text(json.dumps(found))
        distributed.stop()
        return
    for size in worlds:
        ranks, per_node = map(int, size.split("x"))
        for mode in ("none", "zero2", "zero3", "hybrid"):
            world = pretended(ranks, per_node)
            found[f"{size} {mode}"] = step_collectives(world, mode, "fp32")
            distributed.stop()
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    distributed.leave(0)
