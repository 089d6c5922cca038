"""What surrounds the training loop: opening the run folder, resuming, announcing, ending."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastbeit import environment
from fastbeit.data.views import ViewSpec
from fastbeit.training import checkpoint, control
from fastbeit.training.chance import PositionalStats
from fastbeit.training.config import PretrainConfig
from fastbeit.training.config_io import config_to_dict, diff_configs, load_config, save_config
from fastbeit.training.distributed import World
from fastbeit.training.progress import RunLog

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T")


def in_turn(world: World, action: Callable[[], T]) -> T:
    """Do ``action`` on rank 0 first, so that the others find its caches filled."""
    if world.is_main:
        result = action()
        world.barrier()
        return result
    world.barrier()
    return action()


def open_run(config: PretrainConfig, world: World) -> checkpoint.Saved | None:
    """Make the run folder, or find what it left off at.

    Raises:
        ValueError: the folder belongs to a run with another configuration; the message lists every
            difference.
    """
    run_dir = config.run_dir
    saved = checkpoint.find_latest(run_dir / "checkpoints")
    path = run_dir / "config.json"
    if saved is not None and path.exists():
        changes = diff_configs(load_config(path), config)
        if changes and not config.run.allow_config_change:
            raise ValueError(
                f"{run_dir} holds a run at step {saved.step} with another configuration:\n  "
                + "\n  ".join(changes)
                + "\nPass --allow-config-change to go on with the new one, or another --run-dir to "
                "start afresh"
            )
    world.barrier()
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, path)
        (run_dir / "exit.json").unlink(missing_ok=True)
    world.barrier()
    return saved


def config_as_json(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values, for a checkpoint's ``state.json``."""
    return config_to_dict(config)


def settle_precision(config: PretrainConfig, device: torch.device) -> PretrainConfig:
    """``config`` with ``--precision auto`` replaced by what suits ``device``.

    The run folder's config.json keeps "auto": a resume on other hardware may settle otherwise.
    """
    if config.run.precision != "auto":
        return config
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = environment.cpu_bf16() is not None
    return replace(config, run=replace(config.run, precision="bf16" if fast else "fp32"))


def view_spec(config: PretrainConfig, tokenizer: Any) -> ViewSpec:
    """The student's and the tokenizer's view, after checking that the two fit together.

    Raises:
        ValueError: vocabulary or channels of model and tokenizer differ.
    """
    model = config.model
    if model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"the model predicts {model.vocab_size} codes, the tokenizer "
            f"{config.tokenizer.tokenizer!r} has {tokenizer.vocab_size}: pass "
            f"--model.vocab-size {tokenizer.vocab_size}, or another --tokenizer"
        )
    if model.in_channels != tokenizer.channels:
        raise ValueError(
            f"the model reads {model.in_channels} channels, the tokenizer "
            f"{config.tokenizer.tokenizer!r} {tokenizer.channels}: pass "
            f"--model.in-channels {tokenizer.channels}, or another --tokenizer"
        )
    (rows, columns), patch = model.grid, model.patch_size
    patch_rows, patch_columns = (patch, patch) if isinstance(patch, int) else patch
    return ViewSpec(
        size=(rows * patch_rows, columns * patch_columns),
        token_size=(rows * tokenizer.stride, columns * tokenizer.stride),
        token_resample=tokenizer.resample,
        channels=model.in_channels,
        mean=config.data.mean,
        std=config.data.std,
        token_scale=tokenizer.pixel_scale,
        token_offset=tokenizer.pixel_offset,
    )


def restore(
    saved: checkpoint.Saved,
    tensors: dict[str, Tensor],
    stats: PositionalStats,
    fingerprint: str,
    world: World,
) -> None:
    """Load a checkpoint into the live ``tensors`` and statistics.

    Raises:
        ValueError: the data are not those it was trained on, or the tensors don't fit.
    """
    if saved.state["data_fingerprint"] != fingerprint:
        raise ValueError(
            f"{saved.path} was trained on other data than --data gives now (the list of names and "
            "sizes differs), so the order of samples can't be continued; give the same data, or "
            "another --run-dir to start afresh"
        )
    rng = checkpoint.rng_tensors(world) if saved.state["world_size"] == world.size else {}
    counts = torch.zeros_like(tensors["chance.counts"])
    checkpoint.load_tensors(saved, {**tensors, "chance.counts": counts, **rng}, world)
    stats.load(counts)
    if rng:
        checkpoint.restore_rng(rng, world)


def open_log(
    config: PretrainConfig,
    world: World,
    *,
    total_steps: int,
    start_step: int,
    mfu_peak: str | None,
) -> RunLog:
    """The run's log, with the sinks that were asked for."""
    asked = {"tensorboard": config.run.tensorboard, "wandb": config.run.wandb}
    return RunLog(
        config.run_dir,
        total_steps=total_steps,
        start_step=start_step,
        sinks=[name for name, wanted in asked.items() if wanted],
        config=config_to_dict(config),
        mfu_peak=mfu_peak,
        title=f"fastbeit {config.recipe}",
        rank=world.rank,
    )


def announce(
    log: RunLog,
    config: PretrainConfig,
    world: World,
    source: Any,
    tokenizer: Any,
    loader: Any,
    batch_note: str,
    saved: checkpoint.Saved | None,
) -> None:
    """Say what runs, on what, and why."""
    model, about = config.model, tokenizer.describe()
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads each" if name == "CPU" else ""
    masked = config.mask.target / math.prod(model.grid)
    log.note(f"run folder: {config.run_dir}")
    log.note(f"device: {world.size} x {name}{threads}, student in {config.run.precision}")
    log.note(f"sharding: {config.run.shard}; {batch_note}")
    log.note(f"data: {len(source):,} images from {config.data.data}; loader {loader.reason}")
    log.note(
        f"tokenizer: {config.tokenizer.tokenizer}, {about['codes']} codes; up to {masked:.0%} of "
        f"{math.prod(model.grid)} patches masked ({config.mask.strategy})"
    )
    if saved is not None:
        log.note(f"resuming at step {saved.step} from {saved.path}")


def forgiving(log: RunLog, action: Callable[[], Any]) -> None:
    """Run a periodic save; a failure is reported and training goes on to the next one.

    The checkpoint before it is intact; only the last save of a run must succeed.
    """
    try:
        action()
    except OSError as error:
        log.note(f"warning: {error}; training goes on, the next checkpoint will try again")


def save_nonfinite(
    run_dir: Path, world: World, recent: deque[tuple[int, list[int]]], source: Any
) -> str:
    """Write which samples the last steps of this rank saw; returns the sentence to print."""
    path = run_dir / f"nonfinite-rank-{world.rank}.json"
    steps = [
        {"step": step, "samples": [{"index": i, "name": source.name(i)} for i in ids]}
        for step, ids in recent
    ]
    checkpoint.write_durably(path, json.dumps(steps, indent=1))
    return (
        "the loss or the gradient was not finite for too many steps in a row; none of them was "
        f"applied, the checkpoint holds the last good weights, and {path} names the samples. "
        "Lower --lr, or look at those samples"
    )


def out_of_memory_advice(error: Exception, micro_batch: int, accumulation: int) -> str:
    """What to change when the device's memory is too small."""
    first = str(error).splitlines()[0]
    if micro_batch == 1:
        return f"out of memory at one image a rank: {first}. Use a smaller model or --shard zero3"
    return (
        f"out of memory at {micro_batch} images a rank: {first}. Pass --micro-batch "
        f"{micro_batch // 2}: accumulation goes from {accumulation} to {2 * accumulation} and the "
        "global batch stays as it is"
    )


def end(run_dir: Path, world: World, code: int, step: int, reason: str) -> int:
    """Record why the run ended (rank 0) and return the exit code."""
    if world.is_main:
        control.write_exit(run_dir, code, step, reason)
    return code
