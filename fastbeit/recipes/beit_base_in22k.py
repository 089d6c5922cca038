"""BEiT-B/16 on ImageNet-22k: 150 epochs, 10,000 warm-up steps, normalised with 0.5 and 0.5.

Paper: arXiv 2106.08254; code and command: github.com/microsoft/unilm, beit/README.md.

    torchrun --standalone --nproc-per-node 8 -m fastbeit.pretrain beit-base-in22k --data DIR

Steps: 150 epochs x 6,932 = 1,039,800 of 2048 images, for the 14,197,122 images of the 2011 release.
Expected time: none was published (the official code ran on 16 V100-32GB); this code: not measured
yet. Expected accuracy of the official weights after fine-tuning, ImageNet-1k top-1 at 224 px: 83.7,
and 85.2 with intermediate fine-tuning on ImageNet-22k's labels, as published in that README; this
code: not measured yet.
"""

from __future__ import annotations

from dataclasses import replace

from fastbeit.recipes import beit_base_in1k
from fastbeit.training.config import PretrainConfig

SUMMARY = "BEiT-B/16, ImageNet-22k, 150 epochs"
NUM_IMAGES = 14_197_122


def config() -> PretrainConfig:
    """BEiT-B on ImageNet-22k."""
    base = beit_base_in1k.config()
    return replace(
        base,
        recipe="beit-base-in22k",
        data=replace(base.data, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        optimizer=replace(base.optimizer, warmup_steps=10_000),
        run=replace(base.run, epochs=150.0),
    )
