"""The tokenizer's head on a CPU: linear and argmax.

    pytest benchmarks/test_argmax_head.py --benchmark-only

Twins are compared with float64 before they are timed. The kernels' times are those of
`python -m benchmarks.gpu`; here forms in plain PyTorch are chosen.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cpu import Twins, run
from benchmarks.operations import linear_argmax
from benchmarks.operations.linear_argmax import Scores

SHAPES = {"one image": Scores(196, 2048, 8192), "its masked patches": Scores(75, 2048, 8192)}
FORMS: Twins = {
    "reference": lambda _: linear_argmax.ours("reference"),
    "linear_argmax": lambda _: linear_argmax.in_16_bits,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_argmax_head_fp32(benchmark: Any, shape: str, form: str) -> None:
    run(benchmark, linear_argmax.OPERATION, SHAPES[shape], form, FORMS)
