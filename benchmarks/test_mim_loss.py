"""The masked head's loss on a CPU: the reference beside gather, linear and cross_entropy.

    pytest benchmarks/test_mim_loss.py --benchmark-only

Twins are compared with float64 before they are timed. The kernels' times are those of
`python -m benchmarks.gpu`; here forms in plain PyTorch are chosen.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cpu import Twins, run
from benchmarks.operations import cross_entropy
from benchmarks.operations.cross_entropy import peers
from benchmarks.operations.cross_entropy.shapes import Head

BATCH = 2
SHAPES = {
    "positions": Head(BATCH, 197, 75, 768, 8192, empty="none"),
    "selected": Head(BATCH, 197, 75, 768, 8192, positions=False, empty="none"),
}
FORMS: Twins = {
    "reference": lambda _: peers.ours("reference"),
    "eager": lambda _: peers.with_loss(peers.torch_loss),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_mim_loss_fp32(benchmark: Any, shape: str, form: str, direction: Any) -> None:
    """The loss alone, and the loss with every gradient."""
    run(benchmark, cross_entropy.OPERATION, SHAPES[shape], form, FORMS, direction)
