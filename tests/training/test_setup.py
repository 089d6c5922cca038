"""What --precision auto settles on."""

import re
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


def test_the_first_steps_are_told_apart_once_in_a_run(run_python, tmp_path):
    """In a run's output: what they took, before any rate could mislead."""
    words = ["smoke", "--steps=7", "--warmup-steps=1", "--workers=0", "--log-every=7"]
    done = run_python("-m", "fastbeit.pretrain", *words, f"--run-dir={tmp_path}", timeout_s=120)
    told = [line for line in done.stdout.splitlines() if line.startswith("warm-up:")]
    assert len(told) == 1
    assert re.match(
        r"warm-up: the first 5 steps took \d+\.\d s, with all that is compiled", told[0]
    )
    assert done.stdout.index("warm-up:") < done.stdout.index("step=7/7")
