"""Runs the golden trajectory on the ranks torchrun started; rank 0 writes the relative errors."""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from fastbeit.batch import MimBatch
from fastbeit.data import mask_positions
from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.training import distributed
from fastbeit.training.config import OptimizerConfig
from fastbeit.training.optimizer import build_optimizer, set_lr
from fastbeit.training.schedule import cosine_schedule
from fastbeit.training.step import TrainStep

GOLDEN = Path(__file__).parents[1] / "golden" / "trajectory.safetensors"


def native(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official keys to the model's: q_bias and v_bias packed around a zero key bias."""
    state = {
        k: v for k, v in weights.items() if not k.endswith(("relative_position_index", "_bias"))
    }
    for key, q_bias in weights.items():
        if key.endswith("q_bias"):
            prefix = key.removesuffix("q_bias")
            packed = torch.cat([q_bias, torch.zeros_like(q_bias), weights[prefix + "v_bias"]])
            state[prefix + "qkv.bias"] = packed
    return state


def main(out: Path, accumulation: int) -> None:
    world = distributed.start("cpu")
    with safe_open(GOLDEN, "pt") as file:
        meta = file.metadata()
        data = {key: file.get_tensor(key) for key in file.keys()}
    config = BeitConfig(
        image_size=int(meta["img"]),
        patch_size=int(meta["patch"]),
        width=int(meta["dim"]),
        depth=int(meta["depth"]),
        heads=int(meta["heads"]),
        vocab_size=int(meta["vocab"]),
        layer_scale=float(meta["layer_scale"]),
        drop_path=0.0,
    )
    model = BeitForMim(config)
    model.load_state_dict(
        native({k.removeprefix("weights."): v for k, v in data.items() if k.startswith("weights.")})
    )
    placement = distributed.place_model(model, world, mode="zero2", precision="fp32")
    optimizer = build_optimizer(
        model, OptimizerConfig(weight_decay=float(meta["weight_decay"]), betas=(0.9, 0.999))
    )
    masks, tokens = data["input.mask"], data["input.tokens"]
    slots = int(masks.sum(1).max()) + 2  # two empty slots at least, in every image
    rows, columns = config.grid
    positions = torch.from_numpy(mask_positions(masks.view(-1, rows, columns).numpy(), slots))
    targets = tokens.gather(1, positions.clamp(min=0).long())
    batch_size = int(meta["batch"])
    part = batch_size // (world.size * accumulation)
    step_runner = TrainStep(
        model,
        optimizer,
        lambda batch: targets[batch.index],
        world,
        slots=batch_size * slots,
        clip_norm=float(meta["clip"]),
        copies=placement.copies,
        weights=placement.weights,
    )
    errors: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    total = int(meta["steps"])
    for step in range(total):
        lr = cosine_schedule(
            step, float(meta["peak_lr"]), float(meta["min_lr"]), total, int(meta["warmup_steps"])
        )
        set_lr(optimizer, lr)
        first = (step % 4) * batch_size
        batches = []
        for micro in range(accumulation):
            start = first + (micro * world.size + world.rank) * part
            index = torch.arange(start, start + part)
            images = data["input.images"][index]
            batches.append(MimBatch(images, images, positions[index], None, index))
        result = step_runner.run(batches, accumulation)
        for name, got, key in (
            ("loss", result.loss, "output.losses"),
            ("grad_norm", result.grad_norm, "output.grad_norms"),
        ):
            expected = data[key][step].item()
            errors[name].append(abs(got.item() - expected) / expected)
    if world.is_main:
        out.write_text(json.dumps(errors))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    distributed.leave(0)
