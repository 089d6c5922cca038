"""Who turns a batch into targets. Each is a function of a batch: ``[B, M]`` codes, -1 in empty
slots, as the training step takes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.steps.problem import Problem
from fastbeit.batch import MimBatch
from fastbeit.tokenizer.tokenizer import Tokenizer
from fastbeit_kernels import Impl, linear_argmax

Tokenize = Callable[[MimBatch], Tensor]


def reference(problem: Problem, device: torch.device, dtype: torch.dtype) -> Tokenize:
    """As the official code has it: NCHW, eager, logits of every code at every patch, argmax."""
    encoder = problem.encoder().to(device, dtype)

    @torch.no_grad()
    def tokenize(batch: MimBatch) -> Tensor:
        codes = encoder(batch.token_images.to(dtype)).argmax(1).flatten(1)
        positions = batch.positions.long()
        return torch.where(positions >= 0, codes.gather(1, positions.clamp(min=0)), -1)

    return tokenize


def masked_head(problem: Problem, device: torch.device, dtype: torch.dtype) -> Tokenize:
    """The reference's body, and the head on the masked patches' features only."""
    encoder = problem.encoder().to(device, dtype)
    head = encoder.head

    @torch.no_grad()
    def tokenize(batch: MimBatch) -> Tensor:
        rows_BND = encoder.features(batch.token_images.to(dtype)).flatten(2).transpose(1, 2)
        slots = batch.positions.long()
        index = slots.clamp(min=0)[..., None].expand(-1, -1, rows_BND.shape[-1])
        rows = rows_BND.gather(1, index).flatten(0, 1)
        codes = linear_argmax(rows, head.w.flatten(1), head.b, impl="reference")
        return torch.where(slots >= 0, codes.view(slots.shape), -1)

    return tokenize


def ours(
    problem: Problem, device: torch.device, dtype: torch.dtype, impl: Impl = "auto"
) -> Tokenize:
    """`fastbeit.tokenizer.Tokenizer.encode` of the masked patches, as training calls it."""
    tokenizer = Tokenizer(problem.encoder(), impl=impl).to(device, dtype)
    return lambda batch: tokenizer.encode(batch.token_images, batch.positions)


def kernels(problem: Problem, device: torch.device, dtype: torch.dtype) -> Tokenize:
    """Ours by every kernel, shown to be ahead or not."""
    return ours(problem, device, dtype, "triton")


def equal_share(ours: Tensor, theirs: Tensor) -> float:
    """Share of equal codes among filled slots; which slots are filled must be the same."""
    filled = theirs >= 0
    assert torch.equal(ours >= 0, filled), "another set of slots is filled"
    return (ours == theirs)[filled].double().mean().item()
