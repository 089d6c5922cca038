"""BEiT-L/16 on ImageNet-1k: 24 blocks of 1024, LayerScale 1e-5, gradients clipped to 1.0.

Paper: arXiv 2106.08254 (hyperparameters in its appendix); code: github.com/microsoft/unilm, beit/.

    torchrun --nnodes 2 --nproc-per-node 8 ... -m fastbeit.pretrain beit-large-in1k --data DIR

Steps: 800 epochs x 625 = 500,000 of 2048 images. Expected time: none was published; this code: not
measured yet (--plan counts the arithmetic). Expected accuracy after fine-tuning, ImageNet-1k
top-1: 85.2 at 224 px and 86.3 at 384 px as published; this code: not measured yet.
"""

from __future__ import annotations

from dataclasses import replace

from fastbeit.recipes import beit_base_in1k
from fastbeit.training.config import PretrainConfig

SUMMARY = "BEiT-L/16, ImageNet-1k, 800 epochs"
NUM_IMAGES = beit_base_in1k.NUM_IMAGES


def config() -> PretrainConfig:
    """BEiT-L on ImageNet-1k."""
    base = beit_base_in1k.config()
    return replace(
        base,
        recipe="beit-large-in1k",
        model=replace(base.model, width=1024, depth=24, heads=16, layer_scale=1e-5),
        optimizer=replace(base.optimizer, clip_norm=1.0),
    )
