"""What a loader yields and a training step takes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class MimBatch:
    """One micro-batch for masked image modelling. B images, M mask slots.

    Attributes:
        images: ``[B, C, h, w]`` float, normalised for the student, channels-last in memory.
        token_images: ``[B, C, h', w']`` float, of the size and range the tokenizer wants.
        positions: ``[B, M]`` int32, masked patches in raster numbering, ascending; empty slots -1.
        drop_scale: ``[B, 2 * depth]`` float32 DropPath factors (0 or 1/keep), attention then MLP of
            each block, or None when nothing is dropped.
        index: ``[B]`` int64 sample numbers in the source, on the CPU: they name samples in logs and
            are never read by the device.
        targets: ``[B, M]`` int64 tokens of the masked patches where they were made beforehand, else
            None.
    """

    images: Tensor
    token_images: Tensor
    positions: Tensor
    drop_scale: Tensor | None
    index: Tensor
    targets: Tensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> MimBatch:
        """The same batch on ``device``; ``index`` stays on the CPU."""
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
            for field in fields(self)
            if field.name != "index" and getattr(self, field.name) is not None
        }
        return replace(self, **moved)
