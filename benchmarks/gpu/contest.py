"""One problem: time every contestant that is right, all interleaved, and write rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.call import Call, gradients
from benchmarks.gpu.tryout import Contestant, Emit, Row, Step, gather
from benchmarks.operation import SAME, Operation, Pass, Peer, Problem
from benchmarks.roofline import Ceiling
from benchmarks.timing import Limits, Stats, Timer, interleave


def run_problem(
    operation: Operation,
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
    """Rows of a problem's passes. ``slow``: ours against those that compile for long, instead of
    those that don't."""
    sets = problem.input_sets(device, cache_bytes)
    if peers is None:
        able = operation.peers_for(problem.shape)
        peers = [peer for peer in able if peer.ours or peer.slow == slow]
    contestants = gather(operation, problem, peers, sets[0], device, emit, step, excluded or {})
    group = {"problem": problem.name, "tier": "slow" if slow else "quick"}

    for direction in problem.passes:
        calls: dict[str, list[Callable[[], object]]] = {}
        for contestant in contestants:
            step(f"{contestant.peer.name}, {direction}")
            held = [contestant.inputs(inputs) for inputs in sets]
            try:
                calls[contestant.peer.name] = [
                    call_of(contestant, inputs, direction) for inputs in held
                ]
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


def call_of(contestant: Contestant, inputs: Call, direction: Pass) -> Callable[[], object]:
    """What is timed: nothing but this runs between the events."""
    function = contestant.function
    match direction:
        case "forward":
            return lambda: function(inputs)
        case "backward":
            outputs = function(inputs)
            return lambda: gradients(outputs, inputs, keep=True)
        case "both":
            return lambda: gradients(function(inputs), inputs)
        case "no gradient":

            def unrecorded() -> object:
                with torch.no_grad():
                    return function(inputs)

            return unrecorded


def timing_rows(
    problem: Problem,
    direction: Pass,
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
            row |= {
                "roofline_ms": floor_ms,
                "fraction_of_roofline": floor_ms / measured.ms,
                "fraction_of_copy": row["tb_per_s"] / ceiling.tb_per_s,
            }
        rows.append(row)
    return rows
