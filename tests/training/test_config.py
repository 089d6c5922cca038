"""What a configuration means in steps and ranks, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastbeit.data import MaskSpec
from fastbeit.recipes import load_recipe
from fastbeit.training import layout
from fastbeit.training.config import PretrainConfig


def changed(config: PretrainConfig, name: str, value: Any) -> PretrainConfig:
    """``config`` with the field called "part.field" changed."""
    part, _, field = name.partition(".")
    if not field:
        return replace(config, **{part: value})
    return replace(config, **{part: replace(getattr(config, part), **{field: value})})


# ---------------------------------------------------------------- ranks and steps


@pytest.mark.parametrize(
    ("ranks", "micro", "expected"),
    [
        (1, None, (128, 16)),
        (8, None, (128, 2)),
        (16, None, (128, 1)),
        (64, None, (32, 1)),
        (8, 64, (64, 4)),
        (2048, None, (1, 1)),
    ],
)
def test_accumulation_keeps_the_global_batch(
    ranks: int, micro: int | None, expected: tuple[int, int]
) -> None:
    config = changed(load_recipe("beit-base-in1k"), "run.micro_batch", micro)
    result = layout.resolve_batch(config, ranks)
    assert result[:2] == expected
    assert ranks * result.micro_batch * result.accumulation == 2048
    assert ("is kept" in result.note) == (result.accumulation > 1)


def test_the_largest_even_share_is_taken() -> None:
    config = changed(load_recipe("beit-base-in1k"), "run.global_batch", 3 * 200)
    assert layout.resolve_batch(config, 3)[:2] == (100, 2)


@pytest.mark.parametrize(
    ("ranks", "micro", "message"),
    [
        (3, None, r"2048 cannot be split evenly over 3 ranks: use --global-batch 2046 or 2049"),
        (4096, None, r"use --global-batch 4096 .and"),
        (8, 100, r"--micro-batch 100 does not divide the 256 .*use --micro-batch 64 or 128"),
        (8, 512, r"--micro-batch 512 does not divide the 256 .*use --micro-batch 256$"),
        (0, None, r"world size must be at least 1, got 0"),
    ],
)
def test_uneven_batches_are_refused(ranks: int, micro: int | None, message: str) -> None:
    config = changed(load_recipe("beit-base-in1k"), "run.micro_batch", micro)
    with pytest.raises(ValueError, match=message):
        layout.resolve_batch(config, ranks)


def test_steps_count_whole_batches_and_steps_win_over_epochs() -> None:
    config = changed(load_recipe("beit-base-in1k"), "run.global_batch", 100)
    config = changed(config, "run.epochs", 2.5)
    config = changed(config, "optimizer.warmup_epochs", 0.5)
    assert layout.steps_per_epoch(config, 1_099) == 10
    assert layout.total_steps(config, 1_099) == 25
    assert layout.warmup_steps(config, 1_099) == 5
    assert layout.total_steps(changed(config, "run.steps", 7), 1_099) == 7
    assert layout.warmup_steps(changed(config, "optimizer.warmup_steps", 9), 1_099) == 9
    assert layout.total_steps(changed(config, "run.epochs", 0.001), 1_099) == 1


def test_too_few_images_and_a_too_long_warm_up_are_refused() -> None:
    config = load_recipe("beit-base-in1k")
    with pytest.raises(
        ValueError, match=r"2047 images do not fill .* 2048: use --global-batch 2047"
    ):
        layout.steps_per_epoch(config, 2047)
    with pytest.raises(ValueError, match=r"6250 steps is longer than the run of 200: .*steps 10,"):
        layout.warmup_steps(changed(config, "run.steps", 200), 1_281_167)


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data.data", "", r"no images given: use --data DIR"),
        ("mask.target", 197, r"1 and the 196 patches of the 14x14 grid, got 197: use .*target 78"),
        ("mask.target", 0, r"got 0"),
        ("mask.min_block", 76, r"--mask.target 75, got 76: use --mask.min-block 15"),
        ("data.crop_scale", (0.5, 0.2), r"--crop-scale .* got 0.5 0.2"),
        ("data.crop_scale", (0.0, 1.0), r"--crop-scale"),
        ("data.crop_ratio", (-1.0, 1.0), r"--crop-ratio"),
        ("data.flip", 1.5, r"--flip must be a probability"),
        ("data.jitter", (0.4, -0.1, 0.4), r"--jitter must not be negative, got 0.4 -0.1 0.4"),
        ("data.mean", (0.5,), r"--mean has 1 values for --model.in-channels 3: use --mean 0.5 0.5"),
        ("data.std", (0.5, 0.0, 0.5), r"--std must be positive"),
        ("data.workers", -1, r"--workers"),
        ("data.prefetch", 0, r"--prefetch must be at least 1, got 0"),
        ("data.max_pixels", 0, r"--max-pixels"),
        ("data.max_bad_fraction", 2.0, r"--max-bad-fraction must be a share"),
        ("tokenizer.tokenizer", "", r"--tokenizer"),
        ("optimizer.lr", 0.0, r"--lr must be positive"),
        ("optimizer.lr", float("nan"), r"--lr must be positive, got nan"),
        ("optimizer.min_lr", 1.0, r"--min-lr must lie between 0 and --lr 0.0015, got 1.0"),
        ("optimizer.weight_decay", -0.1, r"--weight-decay"),
        ("optimizer.betas", (0.9, 1.0), r"--betas must lie in \[0, 1\), got 0.9 1.0"),
        ("optimizer.eps", 0.0, r"--eps"),
        ("optimizer.clip_norm", -1.0, r"--clip-norm must not be negative .0 turns it off."),
        ("optimizer.warmup_steps", -1, r"--warmup-steps must not be negative"),
        ("optimizer.warmup_epochs", -1.0, r"--warmup-epochs must not be negative"),
        ("optimizer.warmup_epochs", 900.0, r"longer than the run of --epochs 800: use .* 40"),
        ("run.epochs", 0.0, r"--epochs must be positive"),
        ("run.steps", 0, r"--steps must be at least 1, got 0"),
        ("run.stop_after", 0, r"--stop-after"),
        ("run.global_batch", 0, r"--global-batch must be at least 1"),
        ("run.micro_batch", 4096, r"--micro-batch 4096 is larger than --global-batch 2048"),
        ("run.log_every", 0, r"--log-every"),
        ("run.checkpoint_every", 0, r"--checkpoint-every"),
        ("run.keep_checkpoints", 0, r"--keep-checkpoints"),
        ("run.nonfinite_limit", 0, r"--nonfinite-limit"),
        ("run.seed", -1, r"--seed"),
        ("run.stall_minutes", 0.0, r"--stall-minutes"),
    ],
)
def test_what_cannot_work_is_refused_by_name(name: str, value: Any, message: str) -> None:
    config = changed(load_recipe("beit-base-in1k"), "data.data", "somewhere")
    config.validate()
    with pytest.raises(ValueError, match=message) as caught:
        changed(config, name, value).validate()
    assert len(str(caught.value).splitlines()) == 1, "one mistake, one line"


def test_combinations_over_several_parts_are_refused() -> None:
    config = changed(load_recipe("beit-base-in1k"), "data.data", "somewhere")
    grey = changed(config, "model.in_channels", 1)
    with pytest.raises(ValueError, match=r"jitter needs RGB images, and .* is 1: use --jitter 0 0"):
        grey.validate()
    apex = changed(changed(config, "optimizer.optimizer", "apex"), "run.device", "cpu")
    with pytest.raises(ValueError, match=r"apex needs a GPU"):
        apex.validate()
    short = changed(changed(config, "run.steps", 40), "optimizer.warmup_steps", 41)
    with pytest.raises(
        ValueError, match=r"longer than the run of --steps 40: use --warmup-steps 2"
    ):
        short.validate()
    narrow = changed(config, "model.image_size", (32, 224))
    narrow = changed(changed(narrow, "mask.target", 20), "mask.min_block", 20)
    with pytest.raises(ValueError, match=r"--mask: no rectangle of min_block = 20"):
        narrow.validate()


def test_every_mistake_is_reported_at_once() -> None:
    config = changed(load_recipe("demo"), "optimizer.lr", -1.0)
    config = changed(changed(config, "run.seed", -1), "data.flip", 2.0)
    with pytest.raises(ValueError) as caught:
        config.validate()
    assert len(str(caught.value).splitlines()) == 3


def test_the_plan_follows_the_configuration() -> None:
    config = changed(load_recipe("beit-base-in1k"), "model.image_size", (96, 160))
    config = changed(config, "mask.target", 24)
    spec = config.plan_spec()
    assert spec.mask == MaskSpec(grid=(6, 10), target=24, min_block=16)
    assert (spec.crop_scale, spec.flip, spec.jitter) == ((0.08, 1.0), 0.5, (0.4, 0.4, 0.4))
    assert (spec.drop_path, spec.depth) == (0.1, 12)
