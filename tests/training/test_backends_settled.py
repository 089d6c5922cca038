"""What runs the student is settled, tried and said before anything is loaded."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastbeit.model import Backends
from fastbeit.recipes import load_recipe
from fastbeit.training import backends as backends_module
from fastbeit.training.backends import OPERATIONS, settle_backends
from fastbeit.training.config import PretrainConfig
from fastbeit.training.config_io import diff_configs

CPU = torch.device("cpu")


def asking(**run: Any) -> PretrainConfig:
    """A small model with a trained bias, in fp32 unless asked otherwise."""
    base = load_recipe("smoke")
    model = replace(base.model, position="relative", image_size=16)
    return replace(base, model=model, run=replace(base.run, **{"precision": "fp32", **run}))


def test_auto_on_a_cpu_is_the_reference_and_says_so() -> None:
    chosen, notes = settle_backends(asking(), CPU)
    assert chosen == Backends("auto", "auto")
    assert notes == [
        "kernels: reference (PyTorch; Triton's kernels are for GPUs)",
        "attention: as the kernels",
    ]


@pytest.mark.parametrize("attention", ["auto", "triton", "sdpa", "reference"])
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_what_is_asked_for_by_name_is_taken_and_named(kernels, attention) -> None:
    chosen, notes = settle_backends(asking(kernels=kernels, attention=attention), CPU)
    assert chosen == Backends(kernels, attention)
    assert notes[0] == f"kernels: {kernels}, asked for by name"
    how = f"{kernels}, as the kernels" if attention == "auto" else f"{attention}, asked for by name"
    assert notes[1] == f"attention: {how}"


def test_triton_by_name_is_refused_where_it_cannot_run(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"--kernels triton was asked for, but .* on the CPU"):
        settle_backends(asking(kernels="triton"), CPU)
    with pytest.raises(ValueError, match=r"--attention triton can't take a training step on cpu"):
        settle_backends(asking(attention="triton"), CPU)


def test_flex_and_xformers_are_refused_on_a_cpu_with_their_reason(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"--attention flex .* backward on CPU.* --attention auto"):
        settle_backends(asking(attention="flex"), CPU)
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ValueError, match=r"--attention xformers can't .* xformers"):
        settle_backends(asking(attention="xformers"), CPU)


def test_a_backend_without_a_gradient_for_the_bias_is_refused(monkeypatch) -> None:
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = (  # type: ignore[attr-defined]
        lambda q, k, v, attn_bias, scale: q + k[:, : q.shape[1]] + v[:, : q.shape[1]]
    )
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    with pytest.raises(ValueError, match=r"xformers .* in float32: it gives a trained bias no"):
        settle_backends(asking(attention="xformers"), CPU)
    free = asking(attention="xformers")
    free = replace(free, model=replace(free.model, position="absolute"))
    assert settle_backends(free, CPU)[0].attention == "xformers"


@pytest.mark.parametrize(
    ("shown", "cant", "unseen", "precision", "said"),
    [
        (
            (),
            None,
            None,
            "bf16",
            r"reference \(no kernel of them has been shown .*--kernels triton",
        ),
        (OPERATIONS, None, None, "bf16", r"triton for attention, .*layer_norm \(shown right and"),
        (("attention",), None, None, "bf16", r"triton for attention \(shown .*; reference for att"),
        (OPERATIONS, "it is old", None, "bf16", r"kernels: reference \(it is old\)"),
        (OPERATIONS, None, "it is new", "bf16", r"reference \(it is new; --kernels triton takes"),
        (OPERATIONS, None, None, "fp32", r"reference \(the kernels are shown .* in 16 bits"),
    ],
)
def test_auto_on_a_gpu_says_which_operations_run_on_what(
    monkeypatch, shown, cant, unseen, precision, said
) -> None:
    monkeypatch.setattr(backends_module, "SHOWN_ON_A_GPU", frozenset(shown))
    monkeypatch.setattr(backends_module, "why_not", lambda kind, index: cant)
    monkeypatch.setattr(backends_module, "not_shown", lambda kind, index: unseen)
    _, notes = settle_backends(asking(precision=precision), torch.device("cuda", 0))
    assert re.search(said, notes[0])


def test_a_run_may_go_on_with_other_kernels() -> None:
    other = asking(kernels="triton", attention="sdpa", compile="on")
    assert diff_configs(asking(), other) == []
