"""Which precision a run's tokenizer gets, and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbeit.data import open_source
from fastbeit.recipes import load_recipe
from fastbeit.tokenizer.agreement import Agreement
from fastbeit.training import tokenizing
from fastbeit.training.checkpoint import Saved


def found(precision: str, equal: int, not_finite: int = 0) -> Agreement:
    return Agreement(precision, 10_000, equal, 0.1, 0.2, 1.0, not_finite)


def test_the_better_of_those_that_keep_the_tokens() -> None:
    assert tokenizing.best_of([found("fp16", 9_950), found("bf16", 9_990)])[0] == "bf16"
    assert tokenizing.best_of([found("fp16", 9_950), found("bf16", 9_726)])[0] == "fp16"
    assert tokenizing.best_of([found("fp16", 9_999, not_finite=1), found("bf16", 9_900)]) == (
        "bf16",
        "of 10,000 tokens equal to fp32's: fp16 not finite, bf16 99.00 %",
    )
    chosen, reason = tokenizing.best_of([found("bf16", 9_899)])
    assert chosen == "fp32" and reason.endswith("bf16 98.99 %; 99 % are asked for")


def config_of(**changes: Any) -> Any:
    config = load_recipe("demo")
    return replace(config, tokenizer=replace(config.tokenizer, **changes))


@pytest.fixture
def two_formats(monkeypatch) -> None:
    monkeypatch.setattr(tokenizing, "fast_precisions", lambda device: ["fp16", "bf16"])
    monkeypatch.setattr(tokenizing, "TRIED_IMAGES", 16)
    monkeypatch.setattr(tokenizing, "TRIED_AT_ONCE", 8)


def test_auto_measures_on_the_runs_images_and_converts(world, two_formats) -> None:
    source = open_source("demo")
    tokenizer, config, notes = tokenizing.load_run_tokenizer(config_of(), source, world, None)
    chosen = config.tokenizer.tokenizer_precision
    assert chosen == "fp16"  # 99.5 % of tokens on photographs, docs/tokenizers.md
    assert tokenizer.encoder.head.w.dtype == torch.float16
    assert tokenizer.describe()["precision"] == chosen
    assert len(notes) == 1 and notes[0].startswith("tokenizer precision: fp16 (of 784 tokens equal")


def test_a_resumed_run_keeps_what_it_began_with(world, two_formats) -> None:
    saved = Saved(Path("anywhere"), 7, {"tokenizer": {"precision": "bf16"}})
    source = open_source("demo")
    tokenizer, config, notes = tokenizing.load_run_tokenizer(config_of(), source, world, saved)
    assert config.tokenizer.tokenizer_precision == "bf16"
    assert tokenizer.encoder.head.w.dtype == torch.bfloat16
    assert notes == ["tokenizer precision: bf16 (as the run began)"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_is_asked_for_by_name_is_not_discussed(world, precision) -> None:
    asked = config_of(tokenizer_precision=precision)
    tokenizer, config, notes = tokenizing.load_run_tokenizer(asked, [], world, None)
    assert config == asked and notes == []
    assert (
        str(tokenizer.encoder.head.w.dtype)
        == {
            "fp32": "torch.float32",
            "bf16": "torch.bfloat16",
            "fp16": "torch.float16",
        }[precision]
    )


def test_a_run_folder_remembers_the_precision(run_python, tmp_path) -> None:
    """Without it, a resumed run's auto might choose otherwise on another machine."""
    words = ["smoke", "--steps=2", "--warmup-steps=1", "--workers=0", f"--run-dir={tmp_path}"]
    run_python("-m", "fastbeit.pretrain", *words, timeout_s=120)
    state = json.loads((tmp_path / "checkpoints/step-00000002/state.json").read_text())
    assert state["config"]["tokenizer"]["tokenizer_precision"] == "auto"
    assert state["tokenizer"]["precision"] in ("fp32", "bf16")
