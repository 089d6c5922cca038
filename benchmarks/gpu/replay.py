"""The step as a run on one GPU takes it with all its flags, against the plain one: the same losses.

`--tokenize-ahead on` makes tokens on a stream of their own, `--cuda-graph on` replays step and
tokenizer as CUDA graphs. Neither may change a number: a stream that doesn't wait for another, or a
replay that reads what is not there any more, shows in the losses of a few steps on changing
batches. Whether they are equal to the bit is told apart: captured, a library may choose otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.gpu.correctness import Emit

if TYPE_CHECKING:  # fastbeit needs more packages than the kernels do: imported when it is its turn
    from benchmarks.steps.problem import Problem
    from fastbeit.batch import MimBatch
    from fastbeit.training.distributed import World

CASE = "replayed step"
DTYPES = ("bfloat16", "float32")
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
"""Relative gap of losses and gradient norms: the rounding of another order of sums. (An H200 gave
0, and 5e-8 with compiled blocks.)"""
STEPS, BATCH, ACCUMULATION = 12, 16, 2
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Way:
    """How steps are run."""

    ahead: bool = False
    graph: bool = False
    compiled: bool = False
    checkpointing: bool = False


WAYS = {
    "tokens ahead": Way(ahead=True),
    "activation checkpointing": Way(checkpointing=True),
    "CUDA graph": Way(graph=True),
    "tokens ahead, CUDA graph": Way(ahead=True, graph=True),
    "compiled, CUDA graph": Way(graph=True, compiled=True),
    "activation checkpointing, CUDA graph": Way(graph=True, checkpointing=True),
}


def batches(problem: Problem, device: torch.device, dtype: torch.dtype) -> Iterator[MimBatch]:
    """The problem's batch, its images in another order and otherwise scaled in each micro-batch."""
    batch = problem.batch_on(device)
    for number in range(STEPS * ACCUMULATION):
        images = (batch.images.roll(number, 0) * (1 + 0.05 * number)).to(dtype)
        yield replace(
            batch,
            images=images.contiguous(memory_format=torch.channels_last),
            token_images=batch.token_images.roll(number, 0),
            positions=batch.positions.roll(number, 0),
        )


def numbers(problem: Problem, world: World, dtype: torch.dtype, way: Way) -> Tensor:
    """(loss, gradient norm) of each step, [steps, 2] on the CPU."""
    from benchmarks.steps.optimizer_steps import OPTIMIZER, PRECISIONS
    from fastbeit.model import Backends
    from fastbeit.tokenizer import Tokenizer
    from fastbeit.tokenizer.tokenize_ahead import TokenizeAhead
    from fastbeit.training.distributed import place_model
    from fastbeit.training.graph import GraphedStep
    from fastbeit.training.optimizer import build_optimizer, make_capturable, set_lr
    from fastbeit.training.step import TrainStep

    device = world.device
    on_gpu = device.type == "cuda"
    kernels = "triton" if on_gpu else "reference"
    model = problem.student(backends=Backends(kernels=kernels)).to(device)
    model.set_checkpointing(way.checkpointing)
    if way.compiled:
        for block in model.blocks:
            block.compile()  # pyright: ignore[reportCallIssue]
    placement = place_model(model, world, mode="none", precision=PRECISIONS[dtype])
    optimizer = build_optimizer(model, OPTIMIZER)
    if on_gpu:
        make_capturable(optimizer, device)
    low = torch.float16 if on_gpu else torch.float32
    tokenizer = Tokenizer(problem.encoder().to(device, low), impl=kernels)

    def encode(batch: MimBatch) -> Tensor:
        return tokenizer.encode(batch.token_images, batch.positions)

    step = TrainStep(
        model,
        optimizer,
        encode,
        world,
        slots=problem.batch * problem.masked * ACCUMULATION,
        clip_norm=OPTIMIZER.clip_norm,
        weights=placement.weights,
    )
    runner = GraphedStep(step) if way.graph else step
    feed = batches(problem, device, dtype)
    if way.ahead:
        feed = iter(TokenizeAhead(feed, encode, device, graph=way.graph))
    found = []
    for number in range(STEPS):
        set_lr(optimizer, LEARNING_RATE / (1 + number))
        result = runner.run(itertools.islice(feed, ACCUMULATION), ACCUMULATION)
        found.append(torch.stack([result.loss, result.grad_norm]))
    return torch.stack(found).cpu()


def check_replay(dtype: str, device: torch.device, emit: Emit, *, shrink: bool) -> None:
    """A row for each way to run the step; without graphs on a CPU, where there are none."""
    row = {"kind": "correctness", "check": "replayed step", "case": CASE, "dtype": dtype}
    try:
        from benchmarks.steps.optimizer_steps import one_process
        from benchmarks.steps.problem import BASE, TINY
    except ModuleNotFoundError as error:
        emit({**row, "status": "skipped", "reason": f"fastbeit can't be imported: {error}"})
        return
    precision: torch.dtype = getattr(torch, dtype)
    problem = TINY if shrink else replace(BASE, batch=BATCH)
    with one_process(device.type) as world:
        plain = numbers(problem, world, precision, Way())
        for name, way in WAYS.items():
            if way.graph and device.type == "cpu":
                continue
            found = numbers(problem, world, precision, way)
            # Compiled, products' epilogues are rounded elsewhere.
            allowed = ALLOWED[precision] * (10 if way.compiled else 1)
            gap = ((found - plain).abs() / plain.abs()).max().item()
            passed = gap <= allowed  # a NaN fails
            told = "" if passed else f"losses or norms differ by {gap:.1e}, {allowed:g} at most"
            emit(
                {
                    **row,
                    "check": f"replayed step: {name}",
                    "status": "pass" if passed else "fail",
                    "reason": told,
                    "steps": STEPS,
                    "largest_gap": gap,
                    "equal": torch.equal(found, plain),
                }
            )
