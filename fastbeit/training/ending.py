"""How a run ends early: what is written down, what is said, and who leaves how."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

from fastbeit.training import checkpoint, control
from fastbeit.training.distributed import World


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
        return (
            f"out of memory at one image a rank: {first}. Use --activation-checkpointing on, a "
            "smaller model, or --shard zero3 on several GPUs"
        )
    share = micro_batch * accumulation
    fitting = max(n for n in range(1, micro_batch // 2 + 1) if share % n == 0)
    return (
        f"out of memory at {micro_batch} images a rank: {first}. Pass --micro-batch {fitting}: "
        f"accumulation goes from {accumulation} to {share // fitting} and the global batch stays "
        "as it is; or --activation-checkpointing on, for a third more of the student's arithmetic"
    )


def end(run_dir: Path, world: World, code: int, step: int, reason: str) -> int:
    """Record an end that all ranks agree on and return its exit code."""
    if world.is_main:
        control.write_exit(run_dir, code, step, reason)
    if code:
        # torchrun ends all ranks with the first that returns a code: not before this is written.
        world.barrier()
    return code


def end_alone(run_dir: Path, world: World, code: int, step: int, reason: str) -> int:
    """Report and record an end that the other ranks don't know of; they are in a collective."""
    print(f"rank {world.rank}: {reason}", file=sys.stderr, flush=True)
    try:
        control.write_exit(run_dir, code, step, reason)
    except OSError as error:
        print(f"rank {world.rank}: exit.json: {error}", file=sys.stderr, flush=True)
    if world.size > 1:
        # Leaving an NCCL group waits for what is queued on it, which can't end any more: let
        # torchrun see the exit and stop the others.
        sys.stdout.flush()
        os._exit(code)
    return code
