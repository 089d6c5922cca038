"""Choices that change a step's speed and memory and not what it computes, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastbeit import hardware
from fastbeit.tokenizer.dvae import DvaeConfig
from fastbeit.training.config import PretrainConfig
from fastbeit.training.distributed import World
from fastbeit.training.feed import choose_ahead
from fastbeit.training.graph import choose_graph
from fastbeit.training.memory import choose_checkpointing, rank_memory


class Speed(NamedTuple):
    """What was chosen, and a line about each choice."""

    checkpointing: bool
    graph: bool
    ahead: bool
    notes: list[str]


def check_speed(config: PretrainConfig, world: World) -> None:
    """ValueError where a choice was asked for by name that can't be had here."""
    choose_graph(config.run.cuda_graph, world, config.optimizer.optimizer)
    choose_ahead(config.run.tokenize_ahead, world.device)


def settle_speed(config: PretrainConfig, dvae: DvaeConfig, world: World, micro_batch: int) -> Speed:
    """Settle ``--activation-checkpointing``, ``--cuda-graph`` and ``--tokenize-ahead``.

    Args:
        config: with its precisions settled.

    Raises:
        ValueError: one that was asked for can't be had here.
    """
    run, device = config.run, world.device
    graph, why_graph = choose_graph(run.cuda_graph, world, config.optimizer.optimizer)
    ahead, why_ahead = choose_ahead(run.tokenize_ahead, device)
    plain = rank_memory(
        config,
        dvae,
        micro_batch,
        world_size=world.size,
        local_size=world.local_size,
        fused_attention=device.type != "cpu",
        beside=graph or ahead,
    )
    checkpointing, why_checkpointing = choose_checkpointing(
        run.activation_checkpointing, plain, device_memory_bytes(world)
    )
    told = (
        ("activation checkpointing", checkpointing, why_checkpointing),
        ("CUDA graph", graph, why_graph),
        ("tokens ahead of the step", ahead, why_ahead),
    )
    notes = [f"{name}: {'on' if chosen else 'off'} ({why})" for name, chosen, why in told]
    return Speed(checkpointing, graph, ahead, notes)


def device_memory_bytes(world: World) -> int | None:
    """Memory of a rank: its GPU's, or its share of the machine's. None where unknown."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    whole = hardware.memory_bytes()
    return None if whole is None else whole // world.local_size
