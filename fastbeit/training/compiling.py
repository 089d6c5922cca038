"""torch.compile of the blocks, and whether a run repays it.

The choice follows from the configuration and from what the machine is, never from a timing, so that
a resumed run computes as it did before, to the bit. Measured in docs/decisions/0009-cpu-step.md.
"""

from __future__ import annotations

import os
import shutil
from typing import cast

import torch

from fastbeit import environment
from fastbeit.model import BeitForMim
from fastbeit.model.block import Block
from fastbeit.training.config import PretrainConfig
from fastbeit.training.cost import student_flops
from fastbeit.training.distributed import World

REPAID_FLOPS = 1e15
"""FLOPs of the student on one process from which compiling repays on a CPU with bf16 products:
about 10,000 images of ViT-B. Compiling takes 52 s of CPU time; a gain of 12 %, on record for
another BEiT on such a CPU, repays them after a quarter of that. Ours is not measured there."""


def compile_blocks(
    model: BeitForMim, config: PretrainConfig, world: World, total_steps: int, *, graph: bool
) -> str:
    """Compile each block in place if the run is to; a line that says what was done, and why.

    ``graph``: the step will be replayed as a CUDA graph.

    Before :func:`~fastbeit.training.distributed.shard_model`, whose hooks stay outside the compiled
    code. Nothing is compiled before the first step.

    Raises:
        ValueError: ``--compile on``, and no C++ compiler for a CPU.
    """
    images = total_steps * config.run.global_batch / world.size
    flops = images * student_flops(config.model, config.mask.target).total
    chosen, reason = choose(config.run.compile, config.run.precision, world.device, flops, graph)
    if chosen:
        for block in model.blocks:
            cast(Block, block).compile()
    return f"compile: {'on' if chosen else 'off'} ({reason})"


def choose(
    asked: str, precision: str, device: torch.device, flops: float, graph: bool = False
) -> tuple[bool, str]:
    """Whether to compile, and why. ``flops``: of the student on this process, in the whole run."""
    on_cpu = device.type == "cpu"
    if asked == "off":
        return False, "asked for by name"
    if on_cpu and not has_cpp_compiler():
        if asked == "on":
            raise ValueError(
                "--compile on needs a C++ compiler on a CPU, and neither $CXX nor g++ nor clang++ "
                "is there: install one, or use --compile off"
            )
        return False, "there is no C++ compiler"
    if asked == "on":
        return True, "asked for by name"
    if not on_cpu:
        if graph and precision != "fp32":
            return True, "measured faster on a GPU in bf16, together with a CUDA graph"
        return False, "measured slower on a GPU without a CUDA graph; --compile on does"
    if precision == "fp32" or environment.cpu_bf16() is None:
        return False, "measured without gain on a CPU in fp32, or without bf16 products"
    repaid = flops >= REPAID_FLOPS
    return repaid, (
        f"a process has {flops:.1e} FLOP to do, and from {REPAID_FLOPS:.0e} on it is repaid"
    )


def has_cpp_compiler() -> bool:
    """Whether torch.compile finds a compiler for CPU code."""
    asked = os.environ.get("CXX")
    return any(shutil.which(name) for name in (asked, "g++", "clang++") if name)
