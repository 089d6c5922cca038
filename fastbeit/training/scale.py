"""What a step sends between GPUs, counted: every collective of FSDP2 and of the step, in order.

``distributed.shard_model`` makes units of three blocks, one of the relative table and one of the
rest (the root). Each unit is gathered before its forward pass, again before its backward pass where
it was freed in between (zero3, hybrid), and its gradients are reduced in fp32 after the last
micro-batch's backward pass. Gathered weights are in the student's precision, the table in fp32.
FSDP2 pads a parameter's first dimension to a multiple of the shards, so padding is counted too.

One collective over n ranks makes each of them send (n - 1)/n of the tensor to gather or scatter,
and twice that to reduce it for all (around a ring; no algorithm sends less:
github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md). How long that takes is in ``scale_time.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch

from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.training.distributed import BLOCKS_PER_UNIT

Mode = Literal["none", "zero2", "zero3", "hybrid"]
MODES: tuple[Mode, ...] = get_args(Mode)
REDUCE_BYTES = 4
"""Gradients are reduced in fp32."""
TOTALS_BYTES = 32
"""Losses, counts and the gradient norm: four float64, summed over all ranks once a step."""


class Group(NamedTuple):
    """Ranks that take part in a collective, as many on each of the nodes."""

    ranks: int
    nodes: int


class Collective(NamedTuple):
    """One call."""

    kind: Literal["all_gather", "reduce_scatter", "all_reduce"]
    size: int
    """Bytes of the whole tensor: gathered, scattered, or reduced."""
    group: Group

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, and receives."""
        ranks = self.group.ranks
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * (ranks - 1) / ranks * self.size


class Unit(NamedTuple):
    """Parameters that FSDP2 gathers and reduces together."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    item_bytes: int
    """Of a number as it is gathered."""
    blocks: range
    """Which blocks it holds."""

    def numbers(self, shards: int) -> int:
        """Of all its parameters, each padded to ``shards`` equal parts."""
        return sum(
            math.ceil(shape[0] / shards) * shards * math.prod(shape[1:]) for shape in self.shapes
        )


class UnitTraffic(NamedTuple):
    """What one unit sends; collectives over a single rank are left out."""

    unit: Unit
    forward: tuple[Collective, ...]
    """Before its forward pass, of every micro-batch."""
    backward: tuple[Collective, ...]
    """Before its backward pass, of every micro-batch."""
    reduce: tuple[Collective, ...]
    """After the last micro-batch's backward pass, one after the other."""


class Traffic(NamedTuple):
    """What a step sends: units in the order of the forward pass, the root first."""

    units: tuple[UnitTraffic, ...]
    totals: tuple[Collective, ...]

    def collectives(self, accumulation: int = 1) -> Iterable[Collective]:
        """Every call of a step of ``accumulation`` micro-batches."""
        for unit in self.units:
            yield from (unit.forward + unit.backward) * accumulation
            yield from unit.reduce
        yield from self.totals

    def sent(self, accumulation: int = 1) -> float:
        """Bytes that a rank sends in a step."""
        return sum(call.sent for call in self.collectives(accumulation))


def model_units(model: BeitConfig, precision: str) -> list[Unit]:
    """The units that ``shard_model`` makes, in the order in which the forward pass gathers them."""
    with torch.device("meta"):
        parts = BeitForMim(model)
    item_bytes = 2 if precision == "bf16" else 4
    blocks = list(parts.blocks)
    found = []
    for first in range(0, len(blocks), BLOCKS_PER_UNIT):
        numbers = range(first, min(first + BLOCKS_PER_UNIT, len(blocks)))
        tensors = [tensor for number in numbers for tensor in blocks[number].parameters()]
        found.append(_unit(f"blocks {numbers[0]} to {numbers[-1]}", tensors, item_bytes, numbers))
    if parts.rel_pos is not None:
        found.insert(0, _unit("table", parts.rel_pos.parameters(), 4, range(0)))
    within = ("blocks.", "rel_pos_bias.")
    rest = [tensor for name, tensor in parts.named_parameters() if not name.startswith(within)]
    return [_unit("root", rest, item_bytes, range(0)), *found]


def _unit(name: str, tensors: Iterable[torch.Tensor], item_bytes: int, blocks: range) -> Unit:
    return Unit(name, tuple(tuple(tensor.shape) for tensor in tensors), item_bytes, blocks)


def groups(mode: Mode, ranks: int, per_node: int) -> tuple[Group, Group]:
    """The ranks that share one copy of the parameters, and those that hold the same shard.

    Raises:
        ValueError: hybrid on nodes that are not full.
    """
    nodes = math.ceil(ranks / per_node)
    everyone, alone = Group(ranks, nodes), Group(1, 1)
    match mode:
        case "none":
            return alone, everyone
        case "zero2" | "zero3":
            return everyone, alone
        case "hybrid":
            here = min(ranks, per_node)
            if ranks % here:
                raise ValueError(f"--shard hybrid needs full nodes of {per_node}, got {ranks} GPUs")
            return Group(here, 1), Group(nodes, nodes)


def traffic(units: Iterable[Unit], mode: Mode, ranks: int, per_node: int) -> Traffic:
    """Every collective of a step of ``ranks`` processes, ``per_node`` of them on a node."""
    shard, copies = groups(mode, ranks, per_node)
    found = []
    for unit in units:
        numbers = unit.numbers(shard.ranks)
        gather = _call("all_gather", numbers * unit.item_bytes, shard)
        freed = mode in ("zero3", "hybrid") and unit.name != "root"
        reduce = _call("reduce_scatter", numbers * REDUCE_BYTES, shard)
        reduce += _call("all_reduce", numbers // shard.ranks * REDUCE_BYTES, copies)
        found.append(UnitTraffic(unit, gather, gather if freed else (), reduce))
    everyone = Group(ranks, math.ceil(ranks / per_node))
    return Traffic(tuple(found), _call("all_reduce", TOTALS_BYTES, everyone))


def _call(
    kind: Literal["all_gather", "reduce_scatter", "all_reduce"], size: int, group: Group
) -> tuple[Collective, ...]:
    return (Collective(kind, size, group),) if group.ranks > 1 else ()
