"""Which precision a run's tokenizer gets, and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastbeit.data import open_source
from fastbeit.recipes import load_recipe
from fastbeit.tokenizer import load_tokenizer
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


def saved_with(asked: str = "auto", **tokenizer: Any) -> Saved:
    about = {"sha256": load_tokenizer("demo").describe()["sha256"], **tokenizer}
    config = {"tokenizer": {"tokenizer_precision": asked}}
    return Saved(Path("anywhere"), 7, {"tokenizer": about, "config": config})


def test_what_a_run_began_with() -> None:
    tokenizer = load_tokenizer("demo")
    assert tokenizing._begun_with(None, tokenizer) is None
    assert tokenizing._begun_with(saved_with(precision="fp16"), tokenizer) == "fp16"
    # Folders from before the precision was kept: what was asked for by name.
    assert tokenizing._begun_with(saved_with("fp32"), tokenizer) == "fp32"
    assert tokenizing._begun_with(saved_with("auto"), tokenizer) is None
    # Another tokenizer (--allow-config-change) may not fit the format.
    assert tokenizing._begun_with(saved_with(precision="fp16", sha256="0"), tokenizer) is None


def test_images_that_cannot_be_read_are_the_runs_own_affair(world, two_formats, tmp_path) -> None:
    for number in range(8):
        Image.new("RGB", (40, 40), (30 * number, 90, 200)).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes(b"no image")
    config = config_of()
    config = replace(config, data=replace(config.data, max_bad_fraction=0.0))
    source = open_source(tmp_path)
    assert tokenizing.load_run_tokenizer(config, source, world, None)[2][0].startswith("tokenizer")


def test_too_little_memory_to_compare_means_fp32(world, two_formats, monkeypatch) -> None:
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tokenizing, "compare", full)
    _, config, notes = tokenizing.load_run_tokenizer(config_of(), open_source("demo"), world, None)
    assert config.tokenizer.tokenizer_precision == "fp32"
    assert notes == ["tokenizer precision: fp32 (the device's memory is too small to compare)"]


def test_a_resumed_run_keeps_what_it_began_with(world, two_formats) -> None:
    saved = saved_with(precision="bf16")
    source = open_source("demo")
    tokenizer, config, notes = tokenizing.load_run_tokenizer(config_of(), source, world, saved)
    assert config.tokenizer.tokenizer_precision == "bf16"
    assert tokenizer.encoder.head.w.dtype == torch.bfloat16
    assert notes == ["tokenizer precision: bf16 (as the run began)"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_is_asked_for_by_name_is_not_discussed(world, precision) -> None:
    asked = config_of(tokenizer_precision=precision)
    tokenizer, config, notes = tokenizing.load_run_tokenizer(asked, [], world, None)
    assert config == asked
    assert notes == [f"tokenizer precision: {precision} (asked for by name)"]
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
