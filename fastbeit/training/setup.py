"""What comes before the training loop: the run folder, resuming, announcing."""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastbeit import environment
from fastbeit.data.views import ViewSpec
from fastbeit.training import checkpoint
from fastbeit.training.chance import PositionalStats
from fastbeit.training.config import PretrainConfig
from fastbeit.training.config_io import (
    config_from_dict,
    config_to_dict,
    diff_configs,
    save_config,
)
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
    if saved is not None:
        # The checkpoint's own: config.json is replaced by each start, also by one that then fails.
        changes = diff_configs(config_from_dict(saved.state["config"]), config)
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
        save_config(config, run_dir / "config.json")
        (run_dir / "exit.json").unlink(missing_ok=True)
    world.barrier()
    return saved


class InUse(ValueError):
    """Another process trains in the run folder."""


def lock_run(run_dir: Path, world: World) -> BinaryIO | None:
    """Keep other runs out of ``run_dir`` while the returned file is open (rank 0's). Collective.

    Raises:
        InUse: on every rank, when another process trains there.
    """
    file, refusal = None, None
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / "lock", "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
            file.flush()
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).decode(errors="replace")
            refusal = (
                f"{run_dir} is in use by another run ({owner}): stop that one first, or pass "
                "another --run-dir"
            )
        except OSError:
            pass  # a file system without locks can't tell
    heard = [refusal]
    dist.broadcast_object_list(heard, src=0, group=world.control)
    if heard[0] is not None:
        raise InUse(heard[0])
    return file


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
    tokenizer_sha256: str | None,
    allow_change: bool,
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
    before = saved.state["tokenizer"].get("sha256")
    if before != tokenizer_sha256 and not allow_change:
        raise ValueError(
            f"{saved.path} was trained with another tokenizer of that name (sha256 {before}, now "
            f"{tokenizer_sha256}): its tokens mean something else. Give the same file, or pass "
            "--allow-config-change"
        )
    # Only user code draws from these generators: other ranks or another device may differ.
    same = (saved.state["world_size"], saved.state["device"]) == (world.size, world.device.type)
    rng = checkpoint.rng_tensors(world) if same else {}
    counts = torch.zeros_like(tensors["chance.counts"])
    checkpoint.load_tensors(saved, {**tensors, "chance.counts": counts, **rng}, world)
    stats.load(counts)
    if rng:
        checkpoint.restore_rng(rng, world)


def check_length(config: PretrainConfig, start_step: int, total_steps: int) -> None:
    """ValueError where a run is to end before the step at which it is."""
    if start_step > total_steps:
        raise ValueError(
            f"{config.run_dir} is at step {start_step} already and this run would have "
            f"{total_steps}: pass a longer --steps or --epochs, or another --run-dir"
        )
    if start_step < total_steps and (config.run.stop_after or total_steps) <= start_step:
        raise ValueError(
            f"{config.run_dir} is at step {start_step} already: --stop-after "
            f"{config.run.stop_after} lies behind it"
        )


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
    notes: list[str],
    saved: checkpoint.Saved | None,
) -> None:
    """Say what runs, on what, and why."""
    model, about = config.model, tokenizer.describe()
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    threads = ""
    if world.threads_reason:
        threads = f", {torch.get_num_threads()} threads each ({world.threads_reason})"
    masked = config.mask.target / math.prod(model.grid)
    log.note(f"run folder: {config.run_dir}")
    log.note(f"device: {world.size} x {name}{threads}, student in {config.run.precision}")
    if name == "CPU" and config.run.precision == "bf16" and environment.cpu_bf16() is None:
        log.note(
            "warning: this CPU emulates bf16 (matrix products were measured at a seventieth of "
            "fp32's speed on one): give --precision fp32, or auto"
        )
    sharding = config.run.shard if world.size > 1 else "none, with one rank"
    log.note(f"sharding: {sharding}; {batch_note}")
    log.note(f"data: {len(source):,} images from {config.data.data}; loader {loader.reason}")
    log.note(
        f"tokenizer: {config.tokenizer.tokenizer}, {about['codes']} codes; up to {masked:.0%} of "
        f"{math.prod(model.grid)} patches masked ({config.mask.strategy})"
    )
    for note in notes:
        log.note(note)
    if saved is not None:
        log.note(f"resuming at step {saved.step} from {saved.path}")


WARM_UP_STEPS = 5
"""Steps in which blocks are compiled, libraries choose algorithms and graphs are captured."""


def tell_warm_up(log: RunLog, device: torch.device, began_s: float) -> None:
    """Say what the first steps took, that nobody wonders at the first rates. Host sync."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    log.note(
        f"warm-up: the first {WARM_UP_STEPS} steps took {time.perf_counter() - began_s:.1f} s, "
        "with all that is compiled, chosen or captured in them"
    )


def forgiving(log: RunLog, action: Callable[[], Any]) -> None:
    """Run a periodic save; a failure is reported and training goes on to the next one.

    The checkpoint before it is intact; only the last save of a run must succeed.
    """
    try:
        action()
    except OSError as error:
        log.note(f"warning: {error}; training goes on, the next checkpoint will try again")
