"""Which configurations cannot work, and what to change.

Everything here is known before any image, weight or GPU is touched. What the model's sizes rule out
is refused by ``BeitConfig`` itself, and what depends on the number of ranks or of images in
``layout.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastbeit.training.config import PretrainConfig


def problems(config: PretrainConfig, *, need_data: bool = True) -> list[str]:
    """Everything that is wrong with ``config``, one line each with its remedy; empty if nothing."""
    if need_data and not config.data.data:
        first = [
            "no images given: use --data DIR (a folder of images, a list file, tar shards), "
            "or --data demo for the images that come with the package"
        ]
    else:
        first = []
    return [
        *first,
        *_mask(config),
        *_data(config),
        *_optimizer(config),
        *_run(config),
    ]


def _mask(config: PretrainConfig) -> Iterator[str]:
    mask, (rows, columns) = config.mask, config.model.grid
    patches = rows * columns
    if not 1 <= mask.target <= patches:
        yield (
            f"--mask.target must lie between 1 and the {patches} patches of the {rows}x{columns} "
            f"grid, got {mask.target}: use --mask.target {max(1, round(0.4 * patches))} for 40 %"
        )
    elif mask.strategy == "block" and not 1 <= mask.min_block <= mask.target:
        yield (
            f"--mask.min-block must lie between 1 and --mask.target {mask.target}, got "
            f"{mask.min_block}: use --mask.min-block {max(1, round(mask.target / 5))}"
        )
    else:
        try:
            config.mask_spec()
        except ValueError as error:  # what only the mask's own specification can tell
            yield f"--mask: {error}"


def _data(config: PretrainConfig) -> Iterator[str]:
    data, channels = config.data, config.model.in_channels
    low, high = data.crop_scale
    if not 0.0 < low <= high <= 1.0:
        yield f"--crop-scale takes two shares, 0 < smaller <= larger <= 1, got {low} {high}"
    low, high = data.crop_ratio
    if not 0.0 < low <= high:
        yield f"--crop-ratio takes two ratios, 0 < smaller <= larger, got {low} {high}"
    if not 0.0 <= data.flip <= 1.0:
        yield f"--flip must be a probability, 0 to 1, got {data.flip}"
    if min(data.jitter) < 0.0:
        yield f"--jitter must not be negative, got {' '.join(map(str, data.jitter))}"
    if channels != 3 and any(data.jitter):
        yield (
            f"colour jitter needs RGB images, and --model.in-channels is {channels}: "
            "use --jitter 0 0 0"
        )
    for flag, values in (("--mean", data.mean), ("--std", data.std)):
        if len(values) != channels:
            yield (
                f"{flag} has {len(values)} values for --model.in-channels {channels}: use {flag} "
                f"{' '.join(['0.5'] * channels)}, or your data's own"
            )
    if any(not value > 0.0 for value in data.std):
        yield f"--std must be positive, got {' '.join(map(str, data.std))}"
    if data.workers is not None and data.workers < 0:
        yield f"--workers must not be negative, got {data.workers}"
    yield from _at_least(1, {"--prefetch": data.prefetch, "--max-pixels": data.max_pixels})
    if not 0.0 <= data.hw_decoder_load <= 1.0:
        yield f"--hw-decoder-load must be a share, 0 to 1, got {data.hw_decoder_load}"
    if not 0.0 <= data.max_bad_fraction <= 1.0:
        yield f"--max-bad-fraction must be a share, 0 to 1, got {data.max_bad_fraction}"
    if not config.tokenizer.tokenizer:
        yield "--tokenizer must be dall-e, demo, or the path of a safetensors file, got nothing"


def _optimizer(config: PretrainConfig) -> Iterator[str]:
    optimizer, run = config.optimizer, config.run
    if not optimizer.lr > 0.0:
        yield f"--lr must be positive, got {optimizer.lr}"
    elif not 0.0 <= optimizer.min_lr <= optimizer.lr:
        yield (
            f"--min-lr must lie between 0 and --lr {optimizer.lr}, got {optimizer.min_lr}: the "
            "cosine goes down"
        )
    if optimizer.weight_decay < 0.0:
        yield f"--weight-decay must not be negative, got {optimizer.weight_decay}"
    if not all(0.0 <= beta < 1.0 for beta in optimizer.betas):
        yield f"--betas must lie in [0, 1), got {' '.join(map(str, optimizer.betas))}"
    if not optimizer.eps > 0.0:
        yield f"--eps must be positive, got {optimizer.eps}"
    if optimizer.clip_norm < 0.0:
        yield f"--clip-norm must not be negative (0 turns it off), got {optimizer.clip_norm}"
    if optimizer.optimizer == "apex" and run.device == "cpu":
        yield "--optimizer apex needs a GPU, and --device is cpu: use --optimizer adamw"
    # Steps against epochs is compared where the number of images is known (layout.warmup_steps).
    if optimizer.warmup_steps is not None:
        if optimizer.warmup_steps < 0:
            yield f"--warmup-steps must not be negative, got {optimizer.warmup_steps}"
        elif run.steps is not None and optimizer.warmup_steps > run.steps > 0:
            yield (
                f"--warmup-steps {optimizer.warmup_steps} is longer than the run of --steps "
                f"{run.steps}: use --warmup-steps {max(1, run.steps // 20)}"
            )
    elif optimizer.warmup_epochs < 0.0:
        yield f"--warmup-epochs must not be negative, got {optimizer.warmup_epochs}"
    elif run.steps is None and optimizer.warmup_epochs > run.epochs > 0.0:
        yield (
            f"--warmup-epochs {optimizer.warmup_epochs:g} is longer than the run of --epochs "
            f"{run.epochs:g}: use --warmup-epochs {run.epochs / 20:g}"
        )


def _run(config: PretrainConfig) -> Iterator[str]:
    run = config.run
    if run.steps is None and not run.epochs > 0.0:
        yield f"--epochs must be positive, got {run.epochs}"
    yield from _at_least(
        1,
        {
            "--steps": run.steps,
            "--stop-after": run.stop_after,
            "--global-batch": run.global_batch,
            "--micro-batch": run.micro_batch,
            "--log-every": run.log_every,
            "--checkpoint-every": run.checkpoint_every,
            "--keep-checkpoints": run.keep_checkpoints,
            "--nonfinite-limit": run.nonfinite_limit,
        },
    )
    if run.micro_batch is not None and run.micro_batch > run.global_batch > 0:
        yield (
            f"--micro-batch {run.micro_batch} is larger than --global-batch {run.global_batch}: "
            f"use --micro-batch {run.global_batch} or less"
        )
    if run.seed < 0:
        yield f"--seed must not be negative, got {run.seed}"
    if not run.stall_minutes > 0.0:
        yield f"--stall-minutes must be positive, got {run.stall_minutes}"


def _at_least(lowest: int, values: dict[str, int | None]) -> Iterator[str]:
    for flag, value in values.items():
        if value is not None and value < lowest:
            yield f"{flag} must be at least {lowest}, got {value}"
