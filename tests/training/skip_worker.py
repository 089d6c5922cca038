"""Three steps on two ranks, the second with a NaN image on rank 1 only; then an empty batch."""

import json
import sys
from pathlib import Path

import torch

from fastbeit.batch import MimBatch
from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.training import distributed
from fastbeit.training.config import OptimizerConfig
from fastbeit.training.optimizer import build_optimizer, optimizer_tensors
from fastbeit.training.step import TrainStep


def main(folder: Path) -> None:
    world = distributed.start("cpu")
    config = BeitConfig(image_size=32, patch_size=8, width=16, depth=2, heads=2, vocab_size=8)
    model = BeitForMim(config, seed=0)
    placement = distributed.place_model(model, world, mode="zero2", precision="fp32")
    optimizer = build_optimizer(model, OptimizerConfig())
    generator = torch.Generator().manual_seed(world.rank)
    targets = torch.randint(0, 8, (4, 5), generator=generator)
    runner = TrainStep(
        model,
        optimizer,
        lambda batch: targets,
        world,
        slots=40,
        clip_norm=3.0,
        copies=placement.copies,
        weights=placement.weights,
    )
    positions = torch.tensor([[0, 3, 5, 9, -1]] * 4, dtype=torch.int32)
    record = {"skipped": [], "moved": [], "optimizer_steps": []}
    for step in range(3):
        images = torch.randn(4, 3, 32, 32, generator=generator)
        if step == 1 and world.rank == 1:
            images[2, 0, 4, 4] = float("nan")
        before = distributed.full_state(model)
        result = runner.run([MimBatch(images, images, positions, None, torch.arange(4))], 1)
        after = distributed.full_state(model)
        record["skipped"].append(result.skipped.item())
        record["moved"].append(any(not torch.equal(before[k], after[k]) for k in before))
        state = optimizer_tensors(optimizer)
        record["optimizer_steps"].append(state["norm.weight.step"].item())
    empty = torch.full_like(positions, -1)
    result = runner.run([MimBatch(images, images, empty, None, torch.arange(4))], 1)
    record["empty_loss"], record["empty_skipped"] = result.loss.item(), result.skipped.item()
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(record))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    distributed.leave(0)
