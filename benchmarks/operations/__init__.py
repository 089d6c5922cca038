"""Every operation of fastbeit_kernels, in order of worth. A module an operation says it all."""

from __future__ import annotations

from benchmarks.operation import Case, Operation, Problem
from benchmarks.operations import (
    attention,
    convolution,
    cross_entropy,
    embedding,
    gelu,
    layer_norm,
    linear_argmax,
)

OPERATIONS: tuple[Operation, ...] = (
    attention.OPERATION,
    layer_norm.OPERATION,
    cross_entropy.OPERATION,
    linear_argmax.OPERATION,
    convolution.OPERATION,
    embedding.OPERATION,
    gelu.OPERATION,
)


def case_by_name(name: str) -> tuple[Operation, Case]:
    pairs = {case.name: (operation, case) for operation in OPERATIONS for case in operation.cases}
    if name not in pairs:
        raise ValueError(f"no case is called {name!r}; there are: {'; '.join(pairs)}")
    return pairs[name]


def problem_by_name(name: str) -> tuple[Operation, Problem]:
    pairs = {problem.name: (op, problem) for op in OPERATIONS for problem in op.problems}
    if name not in pairs:
        raise ValueError(f"no problem is called {name!r}; there are: {'; '.join(pairs)}")
    return pairs[name]
