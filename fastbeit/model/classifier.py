"""BEiT for image classification: mean of the patch tokens, a norm, a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbeit.model.backends import AUTO, Backends
from fastbeit.model.config import BeitConfig
from fastbeit.model.encoder import BeitEncoder

HEAD_INIT_SCALE = 0.001


class BeitClassifier(BeitEncoder):
    """Encoder, ``fc_norm`` of the patch tokens' mean, linear head ``[num_classes]``.

    Fine-tuning as published uses ``position="relative_per_block"``; loading a checkpoint with one
    shared table copies it into every block. The last norm of pre-training is dropped.

    Args:
        config: the architecture.
        seed, backends: as for ``BeitForMim``.
    """

    def __init__(
        self, config: BeitConfig, seed: int | None = None, *, backends: Backends = AUTO
    ) -> None:
        with torch.random.fork_rng(devices=[]):  # the modules' own start values are overwritten
            super().__init__(config, backends)
            self.fc_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
            self.head = nn.Linear(config.width, config.num_classes)
        self._initialise(seed)
        if not self.head.weight.is_meta:
            with torch.no_grad():
                self.head.weight.mul_(HEAD_INIT_SCALE)

    def features(self, images: Tensor, *, drop_scale: Tensor | None = None) -> Tensor:
        """``[B, T, D]``: the last block's output, CLS first."""
        return self.encode(images, drop_scale=drop_scale)

    def forward(self, images: Tensor, *, drop_scale: Tensor | None = None) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, C, h, w]``."""
        patches = self.features(images, drop_scale=drop_scale)[:, 1:]
        return self.head(self.fc_norm(patches.mean(1)))
