"""``--plan``: what a run would take, printed without training, GPU or data.

Counted figures come from ``cost.py``, estimated ones from ``memory.py``; a rate is only ever the
user's, or a published one named as such.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from fastbeit import hardware
from fastbeit.data import open_source
from fastbeit.model import BeitConfig
from fastbeit.recipes import RECIPES
from fastbeit.tokenizer.dvae import DvaeConfig
from fastbeit.tokenizer.files import DEMO_PATH
from fastbeit.training import layout
from fastbeit.training.config import PretrainConfig
from fastbeit.training.cost import count_parameters, step_flops, student_flops, tokenizer_flops
from fastbeit.training.memory import checkpoint_bytes, choose_checkpointing, rank_memory
from fastbeit.training.peak import peak_flops
from fastbeit.training.scale_assumptions import Assumptions
from fastbeit.training.scale_plan import scale_table

IMAGENET_1K = 1_281_167
PUBLISHED_IMAGES_PER_S = 148
"""A GPU, official code, ViT-B at 224 px: 500,000 steps of 2048 in about 5 days on 16 V100-32GB
(arXiv 2106.08254, appendix)."""
REFERENCE_GPU = "NVIDIA H100 80GB HBM3"
REFERENCE_MEMORY_BYTES = 80_000_000_000


class Row(NamedTuple):
    """One line of the plan."""

    name: str
    value: str
    note: str = ""


class Section(NamedTuple):
    """A titled group of lines."""

    title: str
    rows: list[Row]


def forecast(
    config: PretrainConfig, *, gpus: int, images_per_s: float | None = None
) -> list[Section]:
    """The plan of ``config`` on ``gpus`` ranks.

    Args:
        images_per_s: images per second and GPU; None: the published rate where it applies.

    Raises:
        ValueError: the batch can't be cut for so many ranks, or the warm-up outlasts the run.
    """
    config = _for_gpus(config)
    layout_ = layout.resolve_batch(config, gpus)
    images, images_note = _num_images(config)
    dvae, dvae_note = _tokenizer_config(config)
    steps = layout.total_steps(config, images)
    warmup = layout.warmup_steps(config, images)
    return [
        Section("Arithmetic", list(_arithmetic(config, dvae, dvae_note))),
        Section("Length", list(_length(config, images, images_note, steps, warmup, layout_.note))),
        Section("Time", list(_time(config, dvae, steps, gpus, images_per_s))),
        Section("Memory", list(_memory(config, dvae, layout_.micro_batch, gpus))),
        Section("Disk", list(_disk(config))),
    ]


def print_forecast(
    config: PretrainConfig,
    *,
    gpus: int,
    images_per_s: float | None = None,
    numbers: Assumptions | None = None,
    console: Console | None = None,
) -> None:
    """Prints :func:`forecast` as a table, and the model of many GPUs under it.

    Args:
        numbers: what that model assumes; None: its defaults.
    """
    console = console or Console(width=_columns())
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for section in forecast(config, gpus=gpus, images_per_s=images_per_s):
        table.add_section()
        table.add_row(Text(section.title, style="bold"))
        for row in section.rows:
            table.add_row(*(Text(cell) for cell in ("  " + row.name, row.value, row.note)))
    devices = "1 device" if gpus == 1 else f"{gpus} devices"
    title = f"Plan of {config.recipe} on {devices}: counted, where not called an estimate"
    console.print(Group(Text(title, style="bold"), table))
    config = _for_gpus(config)
    console.print(
        scale_table(
            config,
            _tokenizer_config(config)[0],
            gpus,
            device=REFERENCE_GPU,
            numbers=numbers or Assumptions(),
            images_per_s=images_per_s,
        )
    )


def _for_gpus(config: PretrainConfig) -> PretrainConfig:
    """The plan is for GPUs, and there ``--precision auto`` means bf16."""
    if config.run.precision != "auto":
        return config
    return replace(config, run=replace(config.run, precision="bf16"))


def _columns() -> int | None:
    """A fixed width for a pipe, where nothing tells; None leaves it to the terminal."""
    return None if os.isatty(1) or "COLUMNS" in os.environ else 120


def _num_images(config: PretrainConfig) -> tuple[int, str]:
    reason = "no --data given"
    if config.data.data:
        try:
            return len(open_source(config.data.data)), f"in {config.data.data}"
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0].split(": expected")[0]
    if config.recipe in RECIPES:
        return RECIPES[config.recipe].NUM_IMAGES, f"nominal for {config.recipe}: {reason}"
    return IMAGENET_1K, f"ImageNet-1k's number: {reason}"


def _tokenizer_config(config: PretrainConfig) -> tuple[DvaeConfig, str]:
    """The encoder's sizes, from the file's metadata; no weights are read."""
    name = config.tokenizer.tokenizer
    if name == "dall-e":
        return DvaeConfig(), "DALL-E's encoder"
    path = DEMO_PATH if name == "demo" else name
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return DvaeConfig.from_dict(json.loads(metadata["config"])), f"{name}'s encoder"
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return DvaeConfig(), f"DALL-E's encoder stands in: {name} can't be read here"


def _arithmetic(config: PretrainConfig, dvae: DvaeConfig, dvae_note: str) -> Iterator[Row]:
    model, slots = config.model, config.mask.target
    student = student_flops(model, slots)
    whole = student_flops(model, slots, pruned=False)
    encoder = tokenizer_flops(dvae, model.grid, slots)
    encoder_whole = tokenizer_flops(dvae, model.grid)
    rows, columns = model.grid
    yield Row(
        "parameters",
        f"{count_parameters(model).trained:,}",
        f"{model.depth} blocks of {model.width}, {rows}x{columns} patches, {model.position} "
        "positions, with the MIM head",
    )
    yield Row(
        "student, forward",
        _gflop(student.forward),
        f"an image; {_gflop(whole.forward)} without last-block pruning",
    )
    yield Row("student, backward", _gflop(student.backward), f"{_gflop(whole.backward)} without")
    yield Row(
        "tokenizer, forward",
        _gflop(encoder.total),
        f"{dvae_note}; {_gflop(encoder_whole.total)} with its head at all {rows * columns} tokens, "
        f"not {slots}",
    )
    yield Row(
        "whole step",
        _gflop(step_flops(config, encoder.total)),
        f"an image; {_gflop(whole.total + encoder_whole.total)} without these savings",
    )


def _length(
    config: PretrainConfig, images: int, images_note: str, steps: int, warmup: int, batch_note: str
) -> Iterator[Row]:
    per_epoch = layout.steps_per_epoch(config, images)
    left_out = images - per_epoch * config.run.global_batch
    yield Row("images", f"{images:,}", images_note)
    yield Row("global batch", f"{config.run.global_batch:,}", batch_note.partition("= ")[2])
    yield Row("steps an epoch", f"{per_epoch:,}", f"{left_out:,} images sit out each epoch")
    yield Row("steps", f"{steps:,}", f"{steps / per_epoch:g} epochs; warm-up {warmup:,} steps")
    yield Row("images seen", f"{steps * config.run.global_batch:,}")


def _time(
    config: PretrainConfig, dvae: DvaeConfig, steps: int, gpus: int, images_per_s: float | None
) -> Iterator[Row]:
    total = steps * config.run.global_batch
    if images_per_s is not None:
        yield Row(
            f"at {images_per_s:g} images/s a GPU",
            _hours(total / images_per_s / gpus),
            "the rate given by --images-per-s",
        )
    elif _is_vit_base(config.model):
        yield Row(
            f"at {PUBLISHED_IMAGES_PER_S} images/s a GPU",
            _hours(total / PUBLISHED_IMAGES_PER_S / gpus),
            "published for the official code on V100s; this code's rate depends on the GPU "
            "(docs/performance.md): give --images-per-s",
        )
    else:
        yield Row("hours", "not known", "nothing measured or published: give --images-per-s")
    flops = step_flops(config, tokenizer_flops(dvae, config.model.grid, config.mask.target).total)
    assert config.run.precision != "auto", "settled in forecast()"
    peak = peak_flops(REFERENCE_GPU, config.run.precision)
    assert peak.flops_per_s is not None
    yield Row(
        "arithmetic's limit",
        f"{peak.flops_per_s / flops:,.0f} images/s",
        f"a GPU, if all of its peak were used: {peak.source}",
    )


def _memory(config: PretrainConfig, dvae: DvaeConfig, micro_batch: int, gpus: int) -> Iterator[Row]:
    local = min(gpus, int(os.environ.get("LOCAL_WORLD_SIZE", "8")))
    estimate = partial(
        rank_memory,
        config,
        dvae,
        micro_batch,
        world_size=gpus,
        local_size=local,
        fused_attention=config.run.device != "cpu",
    )
    kept, recomputed = estimate(), estimate(checkpointing=True)
    device, bytes_ = "an 80 GB GPU, assumed", REFERENCE_MEMORY_BYTES
    if config.run.device == "cpu":
        whole = hardware.memory_bytes()
        device, bytes_ = "this machine's share", None if whole is None else whole // local
    checkpointing, why = choose_checkpointing(config.run.activation_checkpointing, kept, bytes_)
    memory = recomputed if checkpointing else kept
    sharded = f"--shard {config.run.shard}"
    if config.run.shard == "hybrid":
        sharded += f" with {local} a node"
    yield Row("fp32 weights", _bytes(memory.master_weights), sharded)
    yield Row("fp32 gradients", _bytes(memory.gradients))
    yield Row("AdamW's moments", _bytes(memory.optimizer_state))
    yield Row(f"{config.run.precision} weight copies", _bytes(memory.gathered_weights))
    yield Row(
        "activations",
        _bytes(memory.activations),
        f"estimate for {micro_batch} images at once (--micro-batch)",
    )
    yield Row(
        "activation checkpointing",
        "on" if checkpointing else "off",
        f"{why} ({device}); with it {_bytes(recomputed.activations)} of activations, "
        f"{_bytes(recomputed.peak)} at the peak, and a third more of the student's arithmetic",
    )
    yield Row("logits", _bytes(memory.loss_head), f"of {config.mask.target} slots an image")
    yield Row(
        "tokenizer",
        _bytes(memory.tokenizer_weights + memory.tokenizer_activations),
        f"{_precision_told(config)}; {_bytes(memory.tokenizer_activations)} of it "
        "only while it encodes (estimate)",
    )
    yield Row(
        "a rank, at its peak",
        _bytes(memory.peak),
        "estimate, without library workspaces and the loader",
    )


def _precision_told(config: PretrainConfig) -> str:
    asked = config.tokenizer.tokenizer_precision
    return "fp32, if auto finds 16 bits too coarse" if asked == "auto" else asked


def _disk(config: PretrainConfig) -> Iterator[Row]:
    each, kept = checkpoint_bytes(config.model), config.run.keep_checkpoints
    yield Row("a checkpoint", _bytes(each), f"every {config.run.checkpoint_every:,} steps")
    yield Row(
        "checkpoints",
        _bytes((kept + 1) * each),
        f"{kept} kept (--keep-checkpoints), and one more while it is written",
    )
    yield Row("exported weights", _bytes(4 * count_parameters(config.model).trained))


def _is_vit_base(model: BeitConfig) -> bool:
    sizes = (model.width, model.depth, model.heads, model.patch_size, model.image_hw)
    return sizes == (768, 12, 12, 16, (224, 224))


def _gflop(flops: float) -> str:
    return f"{flops / 1e9:.3g} GFLOP"


def _bytes(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB"


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.2g} h"
