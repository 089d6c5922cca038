"""What --precision auto settles on."""

from dataclasses import replace

import pytest
import torch

from fastbeit import hardware
from fastbeit.recipes import load_recipe
from fastbeit.training import setup


@pytest.mark.parametrize(
    ("features", "expected"),
    [({"avx2", "amx_bf16"}, "bf16"), ({"avx512_bf16"}, "bf16"), ({"avx2", "avx512f"}, "fp32")],
)
def test_auto_takes_bf16_where_the_cpu_multiplies_it(monkeypatch, features, expected):
    monkeypatch.setattr(hardware, "cpu_features", lambda: frozenset(features))
    demo = load_recipe("demo")
    assert demo.run.precision == "auto"
    settled = setup.settle_precision(demo, torch.device("cpu"))
    assert settled.run.precision == expected
    assert replace(settled, run=demo.run) == demo


def test_a_precision_asked_for_by_name_is_kept(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_features", frozenset)
    base = load_recipe("beit-base-in1k")
    assert setup.settle_precision(base, torch.device("cpu")).run.precision == "bf16"
