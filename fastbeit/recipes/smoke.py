"""Checks an installation: the demo shrunk to a few dozen steps of a tiny model.

    torchrun --standalone -m fastbeit.pretrain smoke

Expected: seconds on a CPU, all of the path from image bytes to the exported weights. It learns
next to nothing, and its accuracy means nothing.
"""

from __future__ import annotations

from dataclasses import replace

from fastbeit.recipes import demo
from fastbeit.training.config import PretrainConfig

SUMMARY = "a few dozen steps of a tiny model on the demo's images; checks an installation"
NUM_IMAGES = demo.NUM_IMAGES


def config() -> PretrainConfig:
    """The smoke test's configuration."""
    base = demo.config()
    return replace(
        base,
        recipe="smoke",
        model=replace(base.model, width=32, depth=2, heads=2),
        optimizer=replace(base.optimizer, warmup_steps=5),
        run=replace(
            base.run,
            steps=40,
            global_batch=32,
            log_every=10,
            checkpoint_every=20,
            evaluate=False,
        ),
    )
