"""BEiT for masked image modelling: predict the visual token of every masked patch.

BEiT: BERT Pre-Training of Image Transformers, https://arxiv.org/abs/2106.08254, section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbeit.model.backends import AUTO, Backends
from fastbeit.model.block import Pending, add_and_norm, gather_rows
from fastbeit.model.config import BeitConfig
from fastbeit.model.encoder import BeitEncoder
from fastbeit_kernels import MimLoss, masked_linear_cross_entropy


class BeitForMim(BeitEncoder):
    """Encoder, last norm, and a linear head over visual tokens at the masked patches.

    Args:
        config: the architecture.
        seed: start values come from a generator of this seed, the same on every device; None takes
            PyTorch's global generator.
        backends: which implementation each operation takes.
    """

    def __init__(
        self, config: BeitConfig, seed: int | None = None, *, backends: Backends = AUTO
    ) -> None:
        with torch.random.fork_rng(devices=[]):  # the modules' own start values are overwritten
            super().__init__(config, backends)
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
            hidden,
            None,
            self.lm_head.weight,
            self.lm_head.bias,
            targets,
            impl=self.backends.kernels,
        )

    def _masked_rows(
        self, images: Tensor, positions: Tensor, drop_scale: Tensor | None, prune: bool
    ) -> Tensor:
        """``[B, M, D]`` after the last norm; rows of empty slots mean nothing."""
        rows = torch.where(positions >= 0, positions + 1, -1)  # CLS is token 0
        x, pending = self._run_blocks(images, positions, drop_scale, rows if prune else None)
        normed = self._last_norm(x, pending)
        return normed if prune else gather_rows(normed, rows)

    def features(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """``[B, T, D]`` after the last norm, CLS first; ``positions [B, M]`` masked if given."""
        return self._last_norm(*self._run_blocks(images, positions, None, None))

    def _last_norm(self, x: Tensor, pending: Pending | None) -> Tensor:
        return add_and_norm(self.norm, x, pending, self.backends.kernels)[1]
