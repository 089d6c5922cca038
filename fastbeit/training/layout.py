"""What a configuration comes to: micro-batches on so many ranks, steps on so many images."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastbeit.training.config import PretrainConfig

DEFAULT_MICRO_BATCH = 128
"""Most images a rank takes at once when ``--micro-batch`` is not given."""


class BatchLayout(NamedTuple):
    """How the global batch is cut: ranks x accumulation x micro_batch images."""

    micro_batch: int
    accumulation: int
    note: str
    """One sentence for the log."""


def resolve_batch(config: PretrainConfig, world_size: int) -> BatchLayout:
    """Cuts the global batch for ``world_size`` ranks; fewer ranks accumulate more, so that the
    recipe's global batch, and with it its learning rate, stays as it is.

    Raises:
        ValueError: the batch cannot be cut evenly; names the nearest that can.
    """
    batch, micro = config.run.global_batch, config.run.micro_batch
    if world_size < 1:
        raise ValueError(f"world size must be at least 1, got {world_size}")
    share, rest = divmod(batch, world_size)
    if rest or not share:
        nearest = [n for n in (share * world_size, (share + 1) * world_size) if n]
        raise ValueError(
            f"--global-batch {batch} cannot be split evenly over {world_size} ranks: use "
            f"--global-batch {' or '.join(map(str, nearest))} (and mind the learning rate), or "
            f"a number of ranks that divides {batch}"
        )
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    if micro is None:
        micro = max(n for n in divisors if n <= DEFAULT_MICRO_BATCH)
    if micro not in divisors:
        below = max(n for n in divisors if n <= micro)
        above = [n for n in divisors if n > micro][:1]
        raise ValueError(
            f"--micro-batch {micro} does not divide the {share} images that each of {world_size} "
            f"rank(s) takes of --global-batch {batch}: use --micro-batch "
            f"{' or '.join(map(str, [below, *above]))}"
        )
    accumulation = share // micro
    ranks = f"{world_size} rank" + "s" * (world_size > 1)
    note = f"global batch {batch} = {ranks} x {micro} images"
    if accumulation > 1:
        note += (
            f" x {accumulation} accumulation steps: the recipe's global batch is kept, "
            "so its learning rate holds"
        )
    return BatchLayout(micro, accumulation, note)


def steps_per_epoch(config: PretrainConfig, num_samples: int) -> int:
    """Optimizer steps of one pass over ``num_samples`` images, the last partial batch dropped.

    Raises:
        ValueError: fewer images than one global batch.
    """
    steps = num_samples // config.run.global_batch
    if steps < 1:
        raise ValueError(
            f"{num_samples} images do not fill one global batch of {config.run.global_batch}: "
            f"use --global-batch {max(num_samples, 1)} or less, or more images"
        )
    return steps


def total_steps(config: PretrainConfig, num_samples: int) -> int:
    """Optimizer steps of the whole run: ``steps``, or else ``epochs`` passes."""
    per_epoch = steps_per_epoch(config, num_samples)
    return config.run.steps or max(1, round(config.run.epochs * per_epoch))


def warmup_steps(config: PretrainConfig, num_samples: int) -> int:
    """Optimizer steps of the warm-up: ``warmup_steps``, or else ``warmup_epochs`` passes.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    per_epoch, total = steps_per_epoch(config, num_samples), total_steps(config, num_samples)
    warmup = config.optimizer.warmup_steps
    if warmup is None:
        warmup = round(config.optimizer.warmup_epochs * per_epoch)
    if warmup > total:
        raise ValueError(
            f"a warm-up of {warmup} steps is longer than the run of {total}: "
            f"use --warmup-steps {max(1, total // 20)}, or a longer run"
        )
    return warmup
