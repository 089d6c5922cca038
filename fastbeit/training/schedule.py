"""The learning-rate schedule: linear warm-up, then half a cosine."""

from __future__ import annotations

import math


def cosine_schedule(
    step: int,
    base: float,
    final: float,
    total_steps: int,
    warmup_steps: int,
    warmup_start: float = 0.0,
) -> float:
    """Value of the schedule at ``step`` (0-based), in the unit of ``base``.

    Step ``k < W`` of a warm-up of ``W`` steps has ``start + (base - start) * k / (W - 1)``, so the
    last warm-up step and the first step after it both have ``base``; step ``W + i`` has
    ``final + (base - final) / 2 * (1 + cos(pi * i / (total - W)))``. This is the rule that BEiT was
    trained with: ``final`` is approached but never reached.

    Raises:
        ValueError: when the step or the warm-up lies outside the run.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps must be between 0 and total_steps={total_steps}, got {warmup_steps}"
        )
    if not 0 <= step < total_steps:
        raise ValueError(f"step must be between 0 and {total_steps - 1}, got {step}")
    if step < warmup_steps:
        if warmup_steps == 1:
            return warmup_start
        return warmup_start + (base - warmup_start) * step / (warmup_steps - 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * progress))
