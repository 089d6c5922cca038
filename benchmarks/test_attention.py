"""Attention with a trained bias on a CPU: the reference beside PyTorch's own forms.

    pytest benchmarks/test_attention.py --benchmark-only

Twins are compared with float64 before they are timed. On a CPU this chooses between forms in plain
PyTorch (`fastbeit_kernels/reference.py`); the kernels' times are `python -m benchmarks.gpu`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import definition, forms, problems
from benchmarks.problems import Inputs, Problem

BATCH = 4
FULL = replace(problems.BASE, batch=BATCH, dtype="float32")
LAST = replace(problems.BASE_LAST, batch=BATCH, dtype="float32")
FORMS: dict[str, Callable[[Problem], forms.Form]] = {
    "reference": forms.ours("reference"),
    "eager": forms.from_core(forms.eager_core),
    "sdpa": forms.from_core(forms.sdpa_core(None)),
    "sdpa_math": forms.from_core(forms.sdpa_core(SDPBackend.MATH)),
}


def gradients_of(form: forms.Form, inputs: Inputs) -> list[torch.Tensor]:
    out = form(inputs)
    return [out.detach(), *torch.autograd.grad(out, list(inputs.leaves.values()), inputs.dout)]


def in_float64(inputs: Inputs) -> list[torch.Tensor]:
    leaves = {n: x.detach().double().requires_grad_() for n, x in inputs.leaves.items()}
    wide = replace(inputs, leaves=leaves, dout=inputs.dout.double())
    return gradients_of(
        lambda held: definition.attention(*held.qkv(), held.leaves["bias"], held.positions).flatten(
            2
        ),
        wide,
    )


@pytest.mark.parametrize("problem", [FULL, LAST], ids=["197x197", "75x197"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_attention_fp32(benchmark: Any, problem: Problem, form: str, direction: str) -> None:
    """Output alone, and output with every gradient."""
    inputs = problems.make_inputs(problem, 0, torch.device("cpu"))
    function = FORMS[form](problem)
    for found, truth in zip(gradients_of(function, inputs), in_float64(inputs), strict=True):
        assert (found - truth).norm() <= 1e-5 * truth.norm()
    if direction == "forward":
        with torch.no_grad():
            benchmark(function, inputs)
    else:
        benchmark(gradients_of, function, inputs)
    if benchmark.stats is not None:
        scale = 1 if direction == "forward" else 3.5  # two products, then five
        flops = scale * problem.work("forward").flops
        benchmark.extra_info["gflops"] = flops / benchmark.stats.stats.median / 1e9
        benchmark.extra_info["images_per_s"] = BATCH / benchmark.stats.stats.median
