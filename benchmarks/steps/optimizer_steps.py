"""Whole optimizer steps, tokenizer included: each a function that takes one and gives (loss,
gradient norm before clipping) as scalars on the device.

All begin with the problem's weights and see its one batch, in every step. Ours run the training
loop's own `TrainStep`; with no lever pulled that is the reference: plain PyTorch, every token
through the last block, and a tokenizer that scores every code at every patch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.steps import official, tokenizers
from benchmarks.steps.problem import Problem
from benchmarks.steps.students import Student, WithoutPruning, compile_each
from benchmarks.steps.tokenizers import Tokenize
from fastbeit.batch import MimBatch
from fastbeit.model import Backends, BeitForMim
from fastbeit.training import distributed
from fastbeit.training.config import OptimizerConfig
from fastbeit.training.distributed import World
from fastbeit.training.graph import WARM_UPS, GraphedStep
from fastbeit.training.optimizer import build_optimizer, make_capturable, param_groups
from fastbeit.training.step import TrainStep
from fastbeit_kernels import Impl

Step = Callable[[], tuple[Tensor, Tensor]]
OPTIMIZER = OptimizerConfig(lr=1e-4)
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@contextlib.contextmanager
def one_process(device: str = "auto") -> Iterator[World]:
    """This process as the only rank; the number of threads stays as it is for all contestants."""
    threads = torch.get_num_threads()
    world = distributed.start(device)
    torch.set_num_threads(threads)
    try:
        yield world
    finally:
        distributed.stop()


@dataclass(frozen=True)
class Levers:
    """What the fast step does otherwise than the reference, in the order of the waterfall.

    One ``--kernels`` takes the kernels of embedding, norms, loss and tokenizer together, so they
    are one lever; attention can be chosen apart. AdamW is PyTorch's fused one throughout: the
    step's clip and skip go through its ``grad_scale``.
    """

    pruning: bool = False
    head: bool = False
    channels_last: bool = False
    half_tokenizer: bool = False
    attention: bool = False
    kernels: bool = False
    compiled: bool = False
    graph: bool = False
    auto: bool = False
    """No lever of its own: what ``--kernels auto`` takes, where no kernel is pulled by name."""

    @property
    def otherwise(self) -> Impl:
        return "auto" if self.auto else "reference"


LEVERS = {
    "pruning": "last block on masked patches only",
    "head": "tokenizer's head on masked patches only",
    "channels_last": "tokenizer channels-last, in place",
    "half_tokenizer": "tokenizer in the student's precision",
    "attention": "attention kernel",
    "kernels": "all other kernels",
    "compiled": "blocks compiled",
    "graph": "CUDA graph",
}
"""Names of the rows."""


def up_to(lever: str) -> Levers:
    """That lever and all before it."""
    names = list(LEVERS)
    pulled = names[: names.index(lever) + 1]
    return replace(Levers(), **dict.fromkeys(pulled, True))


def ours(problem: Problem, world: World, dtype: torch.dtype, levers: Levers) -> Step:
    """`TrainStep` on one process, fp32 masters and arithmetic in ``dtype``."""
    device = world.device
    backends = Backends(
        kernels="triton" if levers.kernels else levers.otherwise,
        attention="triton" if levers.attention else "auto",
    )
    kind = BeitForMim if levers.pruning else WithoutPruning
    model = problem.student(kind, backends).to(device)
    if levers.compiled:
        compile_each(model.blocks)  # pyright: ignore[reportArgumentType]
    placement = distributed.place_model(model, world, mode="none", precision=PRECISIONS[dtype])
    optimizer = build_optimizer(model, OPTIMIZER)
    runner: TrainStep | GraphedStep = TrainStep(
        model,
        optimizer,
        tokenizer_of(problem, device, dtype, levers),
        world,
        slots=problem.batch * problem.masked,
        clip_norm=OPTIMIZER.clip_norm,
        copies=placement.copies,
        weights=placement.weights,
    )
    if levers.graph:
        make_capturable(optimizer, device)
        runner = GraphedStep(runner)
    batch = batch_in(problem, device, dtype)

    def step() -> tuple[Tensor, Tensor]:
        result = runner.run([batch], 1)
        return result.loss, result.grad_norm

    return step


def warm_ups(levers: Levers) -> int:
    """Steps before one is as fast as the next: AdamW makes its state in the first."""
    return WARM_UPS + 1 if levers.graph else 1


def tokenizer_of(
    problem: Problem, device: torch.device, dtype: torch.dtype, levers: Levers
) -> Tokenize:
    """The reference's is in fp32, as the official code's."""
    dtype = dtype if levers.half_tokenizer else torch.float32
    if levers.channels_last:
        impl = "triton" if levers.kernels else levers.otherwise
        return tokenizers.ours(problem, device, dtype, impl)
    if levers.head:
        return tokenizers.masked_head(problem, device, dtype)
    return tokenizers.reference(problem, device, dtype)


def batch_in(problem: Problem, device: torch.device, dtype: torch.dtype) -> MimBatch:
    """The problem's batch with the student's images in ``dtype``, as the loader gives them."""
    batch = problem.batch_on(device)
    return replace(batch, images=batch.images.to(dtype))


def official_style(problem: Problem, student: Student, device: torch.device) -> Step:
    """As the official engine goes: fp32 tokens of all patches, boolean gathers, AdamW without
    fusing, and losses, norm and accuracy read on the host in every step."""
    tokenize = tokenizers.reference(problem, device, torch.float32)
    groups = param_groups(student.module, weight_decay=OPTIMIZER.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas)
    batch = problem.batch_on(device)

    def step() -> tuple[Tensor, Tensor]:
        codes = tokenize(batch)
        labels = codes[codes >= 0]
        logits = student.logits(batch)
        return official.update(student.module, optimizer, logits, labels, OPTIMIZER.clip_norm)

    return step


def best_of_others(
    problem: Problem, student: Student, device: torch.device, dtype: torch.dtype
) -> Step:
    """A library's student at its best: our tokenizer, fused AdamW, nothing read on the host."""
    tokenize = tokenizers.ours(problem, device, dtype)
    groups = param_groups(student.module, weight_decay=OPTIMIZER.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, fused=True)
    batch = problem.batch_on(device)

    def step() -> tuple[Tensor, Tensor]:
        codes = tokenize(batch)
        loss = student.loss(batch, codes)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.module.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm.detach()

    return step
