"""How long a step takes on many GPUs: compute, collectives beside it, loading, checkpoints.

The clock follows FSDP2's streams, as torch 2.13 makes them wait for each other. Compute is one of
them. Gathers and scatters are another, in the order of their calls; all-reduces are a third. A
gather starts at the earliest when the second unit before it starts to compute (in the backward
pass, the unit before it), a scatter when its unit's backward pass ends. Compute waits for its own
unit's gather, and in the backward pass for the scatter of the second unit before it. The update
waits for everything. Time in which compute stands still, or is slowed down, is *exposed*.

Without overlap (gloo: a collective on a CPU holds up its caller) all of it is added up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from fastbeit.training.scale import Collective, Traffic, UnitTraffic
from fastbeit.training.scale_assumptions import PROTOCOLS, Assumptions

Cost = Callable[[Collective], float]
"""Seconds of a collective that has its links to itself."""


def nccl_seconds(call: Collective, numbers: Assumptions) -> float:
    """Seconds by NCCL's own model, for the fastest of its protocols.

    A ring passes every node once, on as many adapters as a node has ranks in the group; it is as
    fast as its slowest link.
    """
    ranks, nodes = call.group
    here = ranks / nodes
    links = [numbers.nvlink_gb_s] * (here > 1) + [numbers.network_gb_s * here] * (nodes > 1)
    bytes_per_s = min(links) * 1e9
    passes = 2 if call.kind == "all_reduce" else 1
    best = float("inf")
    for protocol in PROTOCOLS:
        if protocol.tree:
            if call.kind != "all_reduce":
                continue
            network_hops, hops = 2 * (nodes.bit_length() - 1), 2 * (here - 1)
        else:
            network_hops = passes * (nodes - 1)
            hops = passes * (ranks - 1) - network_hops
        waits_us = protocol.base_us + hops * protocol.nvlink_us + network_hops * protocol.network_us
        best = min(best, waits_us * 1e-6 + call.sent / (bytes_per_s * protocol.share))
    return best


class Compute(NamedTuple):
    """Seconds of one micro-batch on one GPU, by part, and of the update."""

    tokenizer: float
    embedding: float
    blocks: tuple[float, ...]
    """Forward pass, block by block."""
    head: float
    """With the loss."""
    update: float
    """AdamW on all parameters."""
    backward: float = 2.0
    """Backward pass over forward pass."""

    @property
    def micro_batch(self) -> float:
        """A micro-batch without the update."""
        forward = self.embedding + sum(self.blocks) + self.head
        return self.tokenizer + (1 + self.backward) * forward

    def scaled(self, factor: float) -> Compute:
        """The same with ``factor`` times the seconds a micro-batch."""
        return self._replace(
            tokenizer=factor * self.tokenizer,
            embedding=factor * self.embedding,
            blocks=tuple(factor * block for block in self.blocks),
            head=factor * self.head,
        )


@dataclass
class _Clock:
    """Time at which each stream is free."""

    cost: Cost
    slowdown: float
    overlap: bool
    compute: float = 0.0
    links: float = 0.0
    copies: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: {"intra": 0.0, "network": 0.0})

    def send(self, calls: tuple[Collective, ...], ready: float) -> float:
        """Put calls on their streams, one after the other; when the last of them is done."""
        for call in calls:
            seconds = self.cost(call)
            self.busy["network" if call.group.nodes > 1 else "intra"] += seconds
            if not self.overlap:
                self.compute += seconds
                ready = self.compute
            elif call.kind == "all_reduce":
                ready = self.copies = max(self.copies, ready) + seconds
            else:
                ready = self.links = max(self.links, ready) + seconds
        return ready

    def work(self, seconds: float, after: float = 0.0) -> float:
        """Compute, once ``after`` has passed, and slower beside a collective; when it starts."""
        start = max(self.compute, after)
        beside = max(self.links, self.copies) - start
        self.compute = start + seconds + self.slowdown * min(max(beside, 0.0), seconds)
        return start

    def wait(self) -> None:
        self.compute = max(self.compute, self.links, self.copies)


class GpuTime(NamedTuple):
    """A step on the GPUs, without loading."""

    seconds: float
    compute: float
    """Of it, arithmetic and update."""
    intra: float
    """Seconds in which collectives inside a node run."""
    network: float
    """Seconds in which collectives across nodes run."""

    @property
    def exposed(self) -> float:
        """Seconds by which communication makes the step longer."""
        return self.seconds - self.compute


def gpu_time(
    compute: Compute,
    traffic: Traffic,
    cost: Cost,
    *,
    accumulation: int = 1,
    shards: int = 1,
    slowdown: float = 0.0,
    overlap: bool = True,
) -> GpuTime:
    """Seconds of a step of ``accumulation`` micro-batches.

    Args:
        compute: of a rank's micro-batch.
        traffic: what the step sends.
        cost: seconds of a collective.
        shards: ranks over which AdamW's work is split.
        slowdown: share of compute speed lost beside a collective.
        overlap: collectives run beside compute.
    """
    clock = _Clock(cost, slowdown, overlap)
    for micro in range(1, accumulation + 1):
        _micro_batch(clock, compute, traffic.units, last=micro == accumulation)
    clock.wait()
    clock.send(traffic.totals, clock.compute)
    clock.wait()
    update = compute.update / shards
    clock.work(update)
    arithmetic = accumulation * compute.micro_batch + update
    return GpuTime(clock.compute, arithmetic, clock.busy["intra"], clock.busy["network"])


def _micro_batch(
    clock: _Clock, compute: Compute, units: tuple[UnitTraffic, ...], *, last: bool
) -> None:
    def forward(unit: UnitTraffic) -> float:
        blocks = sum(compute.blocks[number] for number in unit.unit.blocks)
        return blocks if unit is not units[0] else compute.embedding

    clock.work(compute.tokenizer)
    starts = [clock.compute, clock.compute]  # of the last two units' computation
    gathered = clock.send(units[0].forward, starts[-1])
    for unit, following in zip(units, (*units[1:], None), strict=True):
        needed = gathered
        if following is not None:
            gathered = clock.send(following.forward, starts[-1])
        starts.append(clock.work(forward(unit), after=needed))
    clock.work(compute.head)

    gathered = clock.send(units[-1].backward, clock.compute)
    clock.work(compute.backward * compute.head)
    scattered = [0.0, 0.0]  # when the last two units' gradients are
    backwards = tuple(reversed(units))
    for unit, following in zip(backwards, (*backwards[1:], None), strict=True):
        needed = max(gathered, scattered[-2])
        if following is not None:
            gathered = clock.send(following.backward, max(clock.compute, needed))
        clock.work(compute.backward * forward(unit), after=needed)
        scattered.append(_reduce(clock, unit) if last else 0.0)


def _reduce(clock: _Clock, unit: UnitTraffic) -> float:
    """When the scatter is done: compute waits for it, not for the all-reduce behind it."""
    scatter = tuple(call for call in unit.reduce if call.kind == "reduce_scatter")
    done = clock.send(scatter, clock.compute)
    clock.send(unit.reduce[len(scatter) :], done)
    return done if scatter else 0.0
