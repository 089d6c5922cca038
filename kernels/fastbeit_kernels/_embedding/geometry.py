"""Where the pixels of a patch lie in memory, whatever the images' memory format.

A patch is K = C * p * q pixels in an order of our choice: (c, y, x), as the weight lies in memory,
or (y, x, c) where images are channels-last. Either way the pixels that follow one another are
neighbours in memory, and a thread takes 16 bytes of them at once. Both orders are planes of p lines
of a run: C planes with runs of q pixels of one colour, or one plane with runs of q pixels of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

READ_STEP = 64
"""The weight's rows are padded to a multiple of this, which every depth of a step divides."""


@triton.jit
def pixel_offsets(k, plane_step, line_step, pixel_step, LINES: tl.constexpr, RUN: tl.constexpr):
    """Of pixels ``k`` of a patch, from its first one."""
    line = k // RUN
    plane = (line // LINES).to(tl.int64) * plane_step
    within = (line % LINES).to(tl.int64) * line_step + (k % RUN).to(tl.int64) * pixel_step
    return plane + within


@triton.jit
def patch_offsets(
    tokens,
    patches,
    across,
    image_step,
    line_step,
    column_step,
    LINES: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
):
    """First pixels of the patches that ``tokens`` name (CLS: the first patch's, to have one)."""
    image = tokens // (patches + 1)
    patch = tl.maximum(tokens % (patches + 1) - 1, 0)
    down = (patch // across).to(tl.int64) * LINES * line_step
    right = (patch % across).to(tl.int64) * PATCH_WIDTH * column_step
    return image.to(tl.int64) * image_step + down + right


@dataclass(frozen=True)
class Geometry:
    """Patches of ``lines`` x ``patch_width`` pixels, ``across`` of them in a row of the grid."""

    batch: int
    channels: int
    lines: int
    patch_width: int
    across: int
    patches: int
    channels_last: bool
    strides: tuple[int, int, int, int]

    @property
    def pixels(self) -> int:
        return self.channels * self.lines * self.patch_width

    @property
    def tokens(self) -> int:
        return self.patches + 1

    def arguments(self) -> dict[str, int]:
        image, plane, line, column = self.strides
        return {
            "image_step": image,
            "plane_step": 0 if self.channels_last else plane,
            "line_step": line,
            "column_step": column,
            "pixel_step": 1 if self.channels_last else column,
            "batch": self.batch,
            "patches": self.patches,
            "across": self.across,
        }

    def constants(self) -> dict[str, Any]:
        run = self.patch_width * (self.channels if self.channels_last else 1)
        return {
            "LINES": self.lines,
            "PATCH_WIDTH": self.patch_width,
            "RUN": run,
            "PIXELS": self.pixels,
        }


def geometry_of(images: Tensor, lines: int, patch_width: int) -> Geometry:
    batch, channels, height, width = images.shape
    image, plane, line, column = images.stride()
    down, across = height // lines, width // patch_width
    channels_last = plane == 1 and column == channels and channels > 1
    return Geometry(
        batch,
        channels,
        lines,
        patch_width,
        across,
        down * across,
        channels_last,
        (image, plane, line, column),
    )


def read_shape(width: int, geometry: Geometry) -> tuple[int, int]:
    return width, -(-geometry.pixels // READ_STEP) * READ_STEP


def readable_weight(weight: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """``[D, C, p, q]`` → ``[D, K padded with zeros]`` in the order of the images' pixels.

    The weight itself where it lies so already; else a copy, of a hundredth of the images' size.
    """
    ordered = weight.permute(0, 2, 3, 1) if geometry.channels_last else weight
    width, columns = read_shape(weight.shape[0], geometry)
    if columns == geometry.pixels:
        return ordered.to(dtype).reshape(width, columns).contiguous()
    read = torch.zeros(width, columns, dtype=dtype, device=weight.device)
    read[:, : geometry.pixels] = ordered.reshape(width, -1)
    return read
