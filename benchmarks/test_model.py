"""The student, ViT-B at 224 pixels with a shared relative table: forward, and forward + backward.

    pytest benchmarks/test_model.py --benchmark-only

A forward is the loss with nothing recorded, as in validation. The reference runs every token
through every block; ours prunes the last one: "fast" with what `auto` takes, "kernels" with every
kernel of ours, shown to be ahead or not. Weights are fp32 for all, and cast in every call. Peers
have the same weights, converted by `fastbeit.interop`, and logits (or loss, gradient norm and a
gradient that passed every block) are compared before anything is timed. transformers and timm
compute the last block on all tokens, and transformers its head too; timm's BEiT has no mask token
and no masked-image head, which are added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.peers import Unavailable
from benchmarks.steps import expected, students
from benchmarks.steps.problem import Problem, base_for, emulated
from benchmarks.steps.students import Student
from benchmarks.suite import (
    COMPILES,
    DEVICE,
    FP32_COMPILED,
    NO_KERNELS,
    NOT_COMPILED,
    WARM_UPS,
    measure,
    missing,
    name_row,
)

Build = Callable[[Problem, torch.device, torch.dtype], Student]
PATHS: dict[str, Build] = {
    "reference": students.reference,
    "fast": students.fast,
    "kernels": students.kernels,
    "fast, compiled": students.compiled(students.fast),
    "kernels, compiled": students.compiled(students.kernels),
    "official style": students.official_style,
    "transformers, eager": partial(students.transformers, attention="eager"),
    "transformers, sdpa": partial(students.transformers, attention="sdpa"),
    "timm": students.timm,
    "transformers, sdpa, compiled": students.transformers_compiled,
    "timm, compiled": students.timm_compiled,
}
DTYPES = ["float32", "bfloat16"] if DEVICE == "cpu" else ["bfloat16", "float32"]
CASES = [(path, dtype) for dtype in DTYPES for path in PATHS]
"""On a GPU the dtype of training first."""


def student_of(path: str, problem: Problem, dtype: torch.dtype) -> Student:
    """Built, or the row is missing with the reason."""
    if (reason := emulated(DEVICE, dtype)) is not None:
        missing(reason)
    if path.startswith("kernels") and DEVICE == "cpu":
        missing(NO_KERNELS)
    if path.endswith("compiled") and not COMPILES:
        missing(NOT_COMPILED)
    if path.endswith("compiled") and DEVICE == "cuda" and dtype == torch.float32:
        missing(FP32_COMPILED)
    try:
        return PATHS[path](problem, torch.device(DEVICE), dtype)
    except Unavailable as error:
        missing(str(error))


@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_forward(benchmark: Any, path: str, dtype: str) -> None:
    """The loss of a batch, nothing recorded."""
    problem, precision = base_for(DEVICE), getattr(torch, dtype)
    about = {"suite": "model", "part": "forward", "path": path, "dtype": dtype}
    name_row(benchmark, about, problem.sizes)
    student = student_of(path, problem, precision)
    batch = problem.batch_on(DEVICE)
    wanted, codes = expected.numbers(problem, DEVICE), expected.targets(problem, DEVICE)
    allowed = expected.TOLERANCES[precision]

    @torch.no_grad()
    def run() -> torch.Tensor:
        return student.loss(batch, codes)

    measure(
        benchmark,
        run,
        **about,
        check=lambda: expected.assert_forward(student, batch, wanted, allowed),
        images=problem.batch,
        work=problem.forward_work(precision),
        rounds=3,
        warmup=WARM_UPS,
        **problem.sizes,
    )


@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_forward_and_backward(benchmark: Any, path: str, dtype: str) -> None:
    """The loss of a batch and every gradient."""
    problem, precision = base_for(DEVICE), getattr(torch, dtype)
    about = {"suite": "model", "part": "forward and backward", "path": path, "dtype": dtype}
    name_row(benchmark, about, problem.sizes)
    student = student_of(path, problem, precision)
    batch = problem.batch_on(DEVICE)
    wanted, codes = expected.numbers(problem, DEVICE), expected.targets(problem, DEVICE)
    allowed = expected.TOLERANCES[precision]
    measure(
        benchmark,
        lambda: student.both(batch, codes),
        **about,
        check=lambda: expected.assert_both(student, batch, codes, wanted, allowed),
        images=problem.batch,
        work=problem.both_work(precision),
        rounds=2,
        warmup=WARM_UPS,
        **problem.sizes,
    )
