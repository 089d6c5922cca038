"""Patch embedding on a CPU: the reference beside BEiT's blend of all patches.

    pytest benchmarks/test_embedding.py --benchmark-only

Twins are compared with float64 before they are timed. The kernels' times are those of
`python -m benchmarks.gpu`; here forms in plain PyTorch are chosen.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cpu import Twins, run
from benchmarks.operations import embedding
from benchmarks.operations.embedding import Patches

BATCH = 4
SHAPES = {
    "masked": Patches(BATCH, empty="none"),
    "channels_last": Patches(BATCH, empty="none", channels_last=True),
    "none_masked": Patches(BATCH, masked=None),
}
FORMS: Twins = {
    "reference": lambda _: embedding.ours("reference"),
    "eager": lambda _: embedding.eager,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_embedding_fp32(benchmark: Any, shape: str, form: str, direction: Any) -> None:
    """Tokens alone, and tokens with every gradient."""
    run(benchmark, embedding.OPERATION, SHAPES[shape], form, FORMS, direction)
