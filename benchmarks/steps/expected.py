"""What every contestant must find, by the reference path in fp32 on the device; computed once.

What is kept lies in the host's memory: on the device it would count in every later row's peak.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.steps import students, tokenizers
from benchmarks.steps.problem import Problem
from benchmarks.steps.students import Student
from fastbeit.batch import MimBatch


@dataclass(frozen=True)
class Expected:
    """Of one forward and backward."""

    logits: Tensor
    loss: float
    gradient_norm: float
    patch_gradient: Tensor


@functools.cache
def targets(problem: Problem, device: str) -> Tensor:
    """``[B, M]`` codes of the problem's batch."""
    place = torch.device(device)
    tokenize = tokenizers.reference(problem, place, torch.float32)
    return tokenize(problem.batch_on(place))


@functools.cache
def numbers(problem: Problem, device: str) -> Expected:
    """Of the problem's batch and targets."""
    place = torch.device(device)
    student = students.reference(problem, place, torch.float32)
    batch = problem.batch_on(place)
    with torch.no_grad():
        logits = student.logits(batch).cpu()
    loss = student.both(batch, targets(problem, device))
    norm = student.gradient_norm()
    assert student.patch_weight.grad is not None
    gradient = student.patch_weight.grad.cpu().clone()
    return Expected(logits, loss.item(), norm.item(), gradient)


TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Relative error by norm of logits and gradients. In fp32 only the order of sums differs; in 16
bits every product's result is rounded, a few times more in a model whose weights are random."""


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative error by norm."""
    wanted = wanted.to(found.device)
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def assert_forward(student: Student, batch: MimBatch, wanted: Expected, allowed: float) -> None:
    """The logits of all masked patches."""
    with torch.no_grad():
        error = off(student.logits(batch), wanted.logits)
    assert error <= allowed, f"logits are {error:.1e} off"


def assert_both(
    student: Student, batch: MimBatch, codes: Tensor, wanted: Expected, allowed: float
) -> None:
    """Loss, the norm of all gradients, and one gradient that has passed every block."""
    loss = student.both(batch, codes).item()
    norm = student.gradient_norm().item()
    assert abs(loss / wanted.loss - 1) <= allowed, f"loss {loss}, expected {wanted.loss}"
    assert abs(norm / wanted.gradient_norm - 1) <= allowed, (
        f"gradient norm {norm}, expected {wanted.gradient_norm}"
    )
    assert student.patch_weight.grad is not None
    error = off(student.patch_weight.grad, wanted.patch_gradient)
    assert error <= allowed, f"the patch projection's gradient is {error:.1e} off"
