"""Residual, LayerScale, DropPath and LayerNorm on a CPU: the reference beside step by step.

    pytest benchmarks/test_layer_norm.py --benchmark-only

Twins are compared with float64 before they are timed. The kernels' times are those of
`python -m benchmarks.gpu`; here forms in plain PyTorch are chosen.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cpu import Twins, run
from benchmarks.operations import layer_norm
from benchmarks.operations.layer_norm import peers
from benchmarks.operations.layer_norm.shapes import Norm

SHAPES = {"residual": Norm(4, 197, 768), "alone": Norm(4, 197, 768, branch=False)}
FORMS: Twins = {
    "reference": lambda _: peers.ours("reference"),
    "step_by_step": lambda _: peers.step_by_step,
    "addcmul": lambda _: peers.with_norm(peers.torch_norm),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_layer_norm_fp32(benchmark: Any, shape: str, form: str, direction: Any) -> None:
    """Outputs alone, and outputs with every gradient."""
    run(benchmark, layer_norm.OPERATION, SHAPES[shape], form, FORMS, direction, kind=shape)
