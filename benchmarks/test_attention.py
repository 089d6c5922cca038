"""Attention with a trained bias on a CPU: the reference beside PyTorch's own forms.

    pytest benchmarks/test_attention.py --benchmark-only

Twins are compared with float64 before they are timed. On a CPU this chooses between forms in plain
PyTorch (`fastbeit_kernels/reference.py`); the kernels' times are `python -m benchmarks.gpu`'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch.nn.attention import SDPBackend

from benchmarks.cpu import Twins, run
from benchmarks.operations import attention
from benchmarks.operations.attention import cases, forms

BATCH = 4
FULL = replace(cases.BASE.shape, batch=BATCH)
LAST = replace(cases.BASE_LAST.shape, batch=BATCH)
FORMS: Twins = {
    "reference": lambda _: forms.ours("reference"),
    "eager": forms.from_core(forms.eager_core),
    "sdpa": forms.from_core(forms.sdpa_core(None)),
    "sdpa_math": forms.from_core(forms.sdpa_core(SDPBackend.MATH)),
}


@pytest.mark.parametrize("shape", [FULL, LAST], ids=["197x197", "75x197"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_attention_fp32(benchmark: Any, shape: Any, form: str, direction: Any) -> None:
    """Output alone, and output with every gradient."""
    run(benchmark, attention.OPERATION, shape, form, FORMS, direction)
