"""BEiT for masked image modelling: predict the visual token of every masked patch.

BEiT: BERT Pre-Training of Image Transformers, https://arxiv.org/abs/2106.08254, section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbeit.model.config import BeitConfig
from fastbeit.model.encoder import BeitEncoder
from fastbeit_kernels import MimLoss, masked_linear_cross_entropy, scale_residual_layer_norm


class BeitForMim(BeitEncoder):
    """Encoder, last norm, and a linear head over visual tokens at the masked patches.

    Args:
        config: the architecture.
        seed: start values come from a generator of this seed, the same on every device; None takes
            PyTorch's global generator.
    """

    def __init__(self, config: BeitConfig, seed: int | None = None) -> None:
        with torch.random.fork_rng(devices=[]):  # the modules' own start values are overwritten
            super().__init__(config)
            self.mask_token = nn.Parameter(torch.empty(1, 1, config.width))
            self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
            self.lm_head = nn.Linear(config.width, config.vocab_size)
        self._initialise(seed)

    def forward(self, images: Tensor, positions: Tensor, *, prune: bool = True) -> Tensor:
        """Logits ``[B, M, V]`` of the masked patches; rows of empty slots are zero."""
        hidden = self._masked_rows(images, positions, None, prune)
        logits = F.linear(hidden, self.lm_head.weight, self.lm_head.bias)
        return torch.where((positions >= 0)[..., None], logits, 0)

    def loss(
        self,
        images: Tensor,
        positions: Tensor,
        targets: Tensor,
        *,
        drop_scale: Tensor | None = None,
        prune: bool = True,
    ) -> MimLoss:
        """Mean cross-entropy over the masked patches.

        Args:
            images: ``[B, C, h, w]`` normalised, any memory format.
            positions: ``[B, M]`` int32 masked patches in raster numbering, -1 in empty slots.
            targets: ``[B, M]`` int64 visual tokens; never read in empty slots.
            drop_scale: ``[B, 2 * depth]`` DropPath factors (0 or 1/keep), attention then MLP of
                each block, or None.
            prune: let only masked patches through the last block's queries, projection and MLP and
                the last norm. Exact; False exists to be compared with.

        Returns:
            MimLoss(loss in nats, correct, count), device scalars; all zero without a filled slot.
            Nothing waits for the device and no shape depends on the data.
        """
        if targets.shape != positions.shape:
            raise ValueError(
                f"targets must be [B, M] = {list(positions.shape)}, got {list(targets.shape)}"
            )
        hidden = self._masked_rows(images, positions, drop_scale, prune)
        targets = torch.where(positions >= 0, targets, -1)
        return masked_linear_cross_entropy(
            hidden, None, self.lm_head.weight, self.lm_head.bias, targets
        )

    def _masked_rows(
        self, images: Tensor, positions: Tensor, drop_scale: Tensor | None, prune: bool
    ) -> Tensor:
        """``[B, M, D]`` after the last norm; rows of empty slots mean nothing."""
        rows = torch.where(positions >= 0, positions + 1, -1)  # CLS is token 0
        last_rows = rows if prune else None
        x = self.encode(images, positions, drop_scale=drop_scale, last_rows=last_rows)
        x = self._last_norm(x)
        if prune:
            return x
        index = rows.clamp(min=0).long()[..., None].expand(-1, -1, x.shape[-1])
        return x.gather(1, index)

    def features(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """``[B, T, D]`` after the last norm, CLS first; ``positions [B, M]`` masked if given."""
        return self._last_norm(self.encode(images, positions))

    def _last_norm(self, x: Tensor) -> Tensor:
        norm = self.norm
        return scale_residual_layer_norm(x, None, weight=norm.weight, bias=norm.bias, eps=norm.eps)[
            1
        ]
