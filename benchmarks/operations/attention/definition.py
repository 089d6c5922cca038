"""The operations written out from their formulas, in whatever precision the inputs have.

Deliberately apart from ``fastbeit_kernels.reference``: in float64 this is the truth that kernels
and peers are judged by, in a lower precision it is "plain PyTorch", whose error is the measure.

Shapes: B images, Tq queries, Tk keys, T tokens, H heads, d head width, R table rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q_BQHd: Tensor,
    k_BKHd: Tensor,
    v_BKHd: Tensor,
    bias: Tensor | None = None,
    positions_BQ: Tensor | None = None,
) -> Tensor:
    """softmax(QKᵀ/√d + bias) V → ``[B, Tq, H, d]``; the softmax of 16-bit inputs is fp32.

    With positions, bias is ``[H, T, Tk]``, row ``positions[b, i]`` is added for query i of image b,
    and the rows of empty slots (-1) are zero.
    """
    width = q_BQHd.shape[-1]
    filled = None
    if positions_BQ is not None:
        filled = (positions_BQ >= 0)[:, :, None, None]
        q_BQHd = torch.where(filled, q_BQHd, 0)
        if bias is not None:
            bias = bias[:, positions_BQ.clamp(min=0).long()].transpose(0, 1)
    q, k, v = (x.transpose(1, 2) for x in (q_BQHd, k_BKHd, v_BKHd))
    scores_BHQK = (q @ k.transpose(-1, -2)) * width**-0.5
    if scores_BHQK.dtype in (torch.float16, torch.bfloat16):
        scores_BHQK = scores_BHQK.float()
    if bias is not None:
        scores_BHQK = scores_BHQK + bias
    out = (torch.softmax(scores_BHQK, -1).to(v.dtype) @ v).transpose(1, 2)
    return out if filled is None else torch.where(filled, out, 0)


def expand(table_RH: Tensor, index_TT: Tensor) -> Tensor:
    """``[R, H]`` and ``[T, T]`` → ``[H, T, T]``."""
    return table_RH[index_TT.long()].permute(2, 0, 1)


def relative_index(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """BEiT's index of an h x w window behind CLS: int64 ``[T, T]``, T = h·w + 1.

    Rows of the table: the (2h-1)(2w-1) offsets, query minus key; CLS→token; token→CLS; CLS→CLS.
    """
    height, width = grid
    row, column = (
        x.flatten()
        for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    down = row[:, None] - row + height - 1
    right = column[:, None] - column + width - 1
    offsets = (2 * height - 1) * (2 * width - 1)
    tokens = height * width + 1
    index = torch.full((tokens, tokens), offsets, dtype=torch.int64)
    index[:, 0] = offsets + 1
    index[0, 0] = offsets + 2
    index[1:, 1:] = down * (2 * width - 1) + right
    return index.to(device)


def table_rows(grid: tuple[int, int]) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
