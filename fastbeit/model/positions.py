"""Relative positions: the index of a window with CLS, and the module that holds a shared table.

The table has (2h-1)(2w-1) rows for the offsets of an h x w window, then CLS→token, token→CLS and
CLS→CLS (arXiv 2106.08254 takes it from T5 by way of Swin).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbeit.model.backends import AUTO, Backends
from fastbeit_kernels import expand_rel_pos_bias


def relative_rows(grid: tuple[int, int]) -> int:
    """Rows of the relative table of an h x w window."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def relative_index(grid: tuple[int, int]) -> Tensor:
    """Table row for each (query, key): int64 ``[T, T]``, T = h*w + 1, CLS first.

    Row of an offset, query minus key: (dy + h - 1) * (2w - 1) + (dx + w - 1).
    """
    height, width = grid
    y = torch.arange(height, device="cpu").repeat_interleave(width)
    x = torch.arange(width, device="cpu").repeat(height)
    dy = y[:, None] - y[None, :] + height - 1
    dx = x[:, None] - x[None, :] + width - 1
    rows = relative_rows(grid)
    index = torch.empty(height * width + 1, height * width + 1, dtype=torch.int64, device="cpu")
    index[1:, 1:] = dy * (2 * width - 1) + dx
    index[0, :] = rows - 3
    index[:, 0] = rows - 2
    index[0, 0] = rows - 1
    return index


class RelativePositionBias(nn.Module):
    """The relative table shared by all blocks; ``forward()`` gives the fp32 bias ``[H, T, T]``.

    A module of its own, so that sharding can wrap it alone and keep the table in fp32.
    """

    relative_position_index: Tensor

    def __init__(self, grid: tuple[int, int], heads: int, backends: Backends = AUTO) -> None:
        super().__init__()
        self.backends = backends
        self.grid = grid
        self.relative_position_bias_table = nn.Parameter(torch.zeros(relative_rows(grid), heads))
        self.register_buffer("relative_position_index", relative_index(grid), persistent=False)

    def forward(self) -> Tensor:
        return expand_rel_pos_bias(
            self.relative_position_bias_table,
            self.relative_position_index,
            grid=self.grid,
            impl=self.backends.kernels,
        )
