"""The student, ViT-B at 224 pixels with a shared relative table: forward, and forward + backward.

    pytest benchmarks/test_model.py --benchmark-only

A forward is the loss with nothing recorded, as in validation. The reference runs every token
through every block; ours by `auto` prunes the last one. Peers have the same weights, converted by
`fastbeit.interop`, and logits (or loss, gradient norm and a gradient that passed every block) are
compared before anything is timed. transformers and timm compute the last block on all tokens, and
transformers its head too; timm's BEiT has no mask token and no masked-image head, which are added.
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
from benchmarks.suite import DEVICE, measure, missing
from fastbeit import environment

Build = Callable[[Problem, torch.device, torch.dtype], Student]
PATHS: dict[str, Build] = {
    "reference": students.reference,
    "fast": students.fast,
    "fast, compiled": students.compiled,
    "official style": students.official_style,
    "transformers, eager": partial(students.transformers, attention="eager"),
    "transformers, sdpa": partial(students.transformers, attention="sdpa"),
    "timm": students.timm,
    "timm, compiled": students.timm_compiled,
}
COMPILES = DEVICE == "cuda" or environment.cpu_bf16() is not None


def student_of(path: str, problem: Problem, dtype: torch.dtype) -> Student:
    """Built, or the row is missing with the reason."""
    if (reason := emulated(DEVICE, dtype)) is not None:
        missing(reason)
    if path.endswith("compiled") and not COMPILES:
        missing(
            "compiling takes a minute and gains nothing in fp32 on a CPU without bf16 products "
            "(docs/decisions/0009-cpu-step.md)"
        )
    try:
        return PATHS[path](problem, torch.device(DEVICE), dtype)
    except Unavailable as error:
        missing(str(error))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
def test_forward(benchmark: Any, path: str, dtype: str) -> None:
    """The loss of a batch, nothing recorded."""
    problem, precision = base_for(DEVICE), getattr(torch, dtype)
    about = {"suite": "model", "part": "forward", "path": path, "dtype": dtype}
    benchmark.extra_info.update(about, sizes=problem.sizes)  # also of a row that is missing
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
        work=problem.forward_work(),
        rounds=3,
        warmup=0,
        **problem.sizes,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
def test_forward_and_backward(benchmark: Any, path: str, dtype: str) -> None:
    """The loss of a batch and every gradient."""
    problem, precision = base_for(DEVICE), getattr(torch, dtype)
    about = {"suite": "model", "part": "forward and backward", "path": path, "dtype": dtype}
    benchmark.extra_info.update(about, sizes=problem.sizes)  # also of a row that is missing
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
        work=problem.both_work(),
        rounds=2,
        warmup=0,
        **problem.sizes,
    )
