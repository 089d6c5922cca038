"""The step as a run on one GPU takes it with all its flags, against the plain one: the same losses.

`--tokenize-ahead on` makes tokens on a stream of their own, `--cuda-graph on` replays step and
tokenizer as CUDA graphs. Neither may change a number: a stream that doesn't wait for another, or a
replay that reads what is not there any more, shows in the losses of a few steps on changing
batches. Whether they are equal to the bit is told apart: captured, a library may choose otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.correctness import Emit
from benchmarks.steps.optimizer_steps import OPTIMIZER, PRECISIONS, one_process
from benchmarks.steps.problem import BASE, TINY, Problem
from fastbeit.batch import MimBatch
from fastbeit.model import Backends
from fastbeit.tokenizer import Tokenizer
from fastbeit.tokenizer.tokenize_ahead import TokenizeAhead
from fastbeit.training.distributed import World, place_model
from fastbeit.training.graph import WARM_UPS, GraphedStep
from fastbeit.training.optimizer import build_optimizer, make_capturable, set_lr
from fastbeit.training.step import TrainStep

CASE = "replayed step"
DTYPES = ("bfloat16", "float32")
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
"""Relative gap of losses and gradient norms: the rounding of another order of sums."""
STEPS, BATCH = 4 * WARM_UPS, 16
LEARNING_RATE = 1e-4


def batches(problem: Problem, device: torch.device, dtype: torch.dtype) -> Iterator[MimBatch]:
    """The problem's batch, its images in another order and otherwise scaled in each step."""
    batch = problem.batch_on(device)
    for step in range(STEPS):
        images = (batch.images.roll(step, 0) * (1 + 0.1 * step)).to(dtype)
        yield replace(
            batch,
            images=images.contiguous(memory_format=torch.channels_last),
            token_images=batch.token_images.roll(step, 0),
            positions=batch.positions.roll(step, 0),
        )


def numbers(
    problem: Problem, world: World, dtype: torch.dtype, *, ahead: bool, graph: bool
) -> Tensor:
    """(loss, gradient norm) of each step, [steps, 2] on the CPU."""
    device = world.device
    kernels = "reference" if device.type == "cpu" else "triton"
    model = problem.student(backends=Backends(kernels=kernels)).to(device)
    placement = place_model(model, world, mode="none", precision=PRECISIONS[dtype])
    optimizer = build_optimizer(model, OPTIMIZER)
    if device.type == "cuda":
        make_capturable(optimizer, device)
    low = torch.float16 if device.type == "cuda" else torch.float32
    tokenizer = Tokenizer(problem.encoder().to(device, low), impl=kernels)

    def encode(batch: MimBatch) -> Tensor:
        return tokenizer.encode(batch.token_images, batch.positions)

    step = TrainStep(
        model,
        optimizer,
        encode,
        world,
        slots=problem.batch * problem.masked,
        clip_norm=OPTIMIZER.clip_norm,
        weights=placement.weights,
    )
    runner = GraphedStep(step) if graph else step
    feed = batches(problem, device, dtype)
    found = []
    for number, batch in enumerate(
        TokenizeAhead(feed, encode, device, graph=graph) if ahead else feed
    ):
        set_lr(optimizer, LEARNING_RATE / (1 + number))
        result = runner.run([batch], 1)
        found.append(torch.stack([result.loss, result.grad_norm]))
    return torch.stack(found).cpu()


def check_replay(dtype: str, device: torch.device, emit: Emit, *, shrink: bool) -> None:
    """A row for each way to run the step; without graphs on a CPU, where there are none."""
    precision: torch.dtype = getattr(torch, dtype)
    problem = TINY if shrink else replace(BASE, batch=BATCH)
    ways = {"tokens ahead": (True, False)}
    if device.type == "cuda":
        ways |= {"CUDA graph": (False, True), "tokens ahead, CUDA graph": (True, True)}
    with one_process(device.type) as world:
        plain = numbers(problem, world, precision, ahead=False, graph=False)
        for way, (ahead, graph) in ways.items():
            found = numbers(problem, world, precision, ahead=ahead, graph=graph)
            gap = ((found - plain).abs() / plain.abs()).max().item()
            passed = gap <= ALLOWED[precision]  # a NaN fails
            emit(
                {
                    "kind": "correctness",
                    "check": f"replayed step: {way}",
                    "case": CASE,
                    "dtype": dtype,
                    "status": "pass" if passed else "fail",
                    "reason": ""
                    if passed
                    else f"losses or norms differ by {gap:.1e}, {ALLOWED[precision]:g} at most",
                    "steps": STEPS,
                    "largest_gap": gap,
                    "equal": torch.equal(found, plain),
                }
            )
