"""One problem: time every contestant that is right, all interleaved, and write rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.gpu.tryout import SAME, Contestant, Emit, Row, Step, gather, gradients
from benchmarks.peers import Peer, peers_for
from benchmarks.problems import Inputs, Problem, input_sets
from benchmarks.roofline import Ceiling
from benchmarks.timing import Limits, Stats, Timer, interleave


def run_problem(
    problem: Problem,
    emit: Emit,
    step: Step,
    *,
    timer: Timer,
    limits: Limits,
    device: torch.device,
    ceiling: Ceiling | None,
    cache_bytes: int,
    slow: bool,
    excluded: Mapping[str, str] | None = None,
    peers: Sequence[Peer] | None = None,
) -> None:
    """Rows of a problem's forward and backward. ``slow``: ours against those that compile for
    long, instead of those that don't."""
    sets = input_sets(problem, device, cache_bytes)
    if peers is None:
        peers = [peer for peer in peers_for(problem) if peer.ours or peer.slow == slow]
    contestants = gather(problem, peers, sets[0], emit, step, excluded or {})
    group = {"problem": problem.name, "tier": "slow" if slow else "quick"}

    for direction in ("forward", "backward"):
        calls: dict[str, list[Callable[[], object]]] = {}
        for contestant in contestants:
            step(f"{contestant.peer.name}, {direction}")
            held = [contestant.inputs(inputs) for inputs in sets]
            try:
                calls[contestant.peer.name] = _calls(contestant, held, direction)
            except torch.OutOfMemoryError as error:
                reason = f"out of memory: {' '.join(str(error).split())[:200]}"
                emit(
                    {
                        "kind": "timing",
                        **group,
                        "pass": direction,
                        "contestant": contestant.peer.name,
                        "status": "failed",
                        "reason": reason,
                    }
                )
        step(f"timing, {direction}")
        stats = interleave(calls, timer, limits)
        running = [c for c in contestants if c.peer.name in stats]
        for row in timing_rows(problem, direction, running, stats, ceiling):
            emit({**group, **row})
        del calls
        gc.collect()


def _calls(
    contestant: Contestant, sets: Sequence[Inputs], direction: str
) -> list[Callable[[], object]]:
    form, leaves = contestant.form, contestant.leaves

    def forward(inputs: Inputs) -> Callable[[], object]:
        return lambda: form(inputs)

    def backward(inputs: Inputs) -> Callable[[], object]:
        out = form(inputs)
        return lambda: gradients(out, inputs, leaves, keep=True)

    make = forward if direction == "forward" else backward
    return [make(inputs) for inputs in sets]


def timing_rows(
    problem: Problem,
    direction: str,
    contestants: Sequence[Contestant],
    stats: Mapping[str, Stats],
    ceiling: Ceiling | None,
) -> list[Row]:
    """One row a contestant; ratios to the best peer that does the same work."""
    work = problem.work(direction)
    rivals = [
        stats[c.peer.name].ms for c in contestants if not c.peer.ours and c.work(direction) == SAME
    ]
    best_ms = min(rivals, default=None)
    rows = []
    for contestant in contestants:
        measured = stats[contestant.peer.name]
        row: Row = {
            "kind": "timing",
            "problem": problem.name,
            "pass": direction,
            "contestant": contestant.peer.name,
            "ours": contestant.peer.ours,
            "work": contestant.work(direction),
            "status": "ok",
            "error": contestant.error,
            **measured.as_row(),
            "flops": work.flops,
            "bytes": work.bytes,
            "tflops": work.flops / measured.ms / 1e9,
            "tb_per_s": work.bytes / measured.ms / 1e9,
            "ratio_to_best_peer": None if best_ms is None else measured.ms / best_ms,
        }
        if ceiling is not None:
            floor_ms = ceiling.floor_ms(work)
            row |= {"roofline_ms": floor_ms, "fraction_of_roofline": floor_ms / measured.ms}
        rows.append(row)
    return rows
