"""Position parameters taken to another grid, by the rules of the official fine-tuning code.

Shapes: R table rows, H heads, T tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit.model.positions import relative_rows


def resize_relative_table(
    table: Tensor, source_grid: tuple[int, int], target_grid: tuple[int, int]
) -> Tensor:
    """A relative table ``[R, H]`` for another window, fp32 or fp64 as it came, else fp32.

    Along each axis the source offsets are placed at geometric sums 1, 1 + q, 1 + q + q², ... with q
    such that the last reaches the target's largest offset: near offsets keep their distance, far
    ones are stretched. A cubic spline through them (not-a-knot ends) is read at whole offsets. The
    three CLS rows are copied. A smaller window keeps the offsets that remain. (q = 1.09031 from 14
    to 24 patches. The official rule is for squares; here each axis has its own q.)

    Raises:
        ValueError: the table is not of the source grid.
    """
    if table.dim() != 2 or table.shape[0] != relative_rows(source_grid):
        raise ValueError(
            f"a relative table of a {source_grid[0]}x{source_grid[1]} grid is "
            f"[{relative_rows(source_grid)}, heads], got {list(table.shape)}"
        )
    dtype = table.dtype if table.dtype == torch.float64 else torch.float32
    if source_grid == target_grid:
        return table.to(dtype)
    offsets, cls_rows = table[:-3].double(), table[-3:].to(dtype)
    height, width = (2 * side - 1 for side in source_grid)
    down, across = (
        _axis_weights(source, target).to(table.device)
        for source, target in zip(source_grid, target_grid, strict=True)
    )
    resized = torch.einsum("yi,xj,ijh->yxh", down, across, offsets.unflatten(0, (height, width)))
    return torch.cat((resized.flatten(0, 1).to(dtype), cls_rows))


def resize_pos_embed(
    pos_embed: Tensor, source_grid: tuple[int, int], target_grid: tuple[int, int]
) -> Tensor:
    """Absolute positions ``[1, T, D]``, CLS first, for another grid: bicubic, CLS copied.

    Raises:
        ValueError: the positions are not of the source grid.
    """
    tokens = source_grid[0] * source_grid[1] + 1
    if pos_embed.dim() != 3 or pos_embed.shape[:2] != (1, tokens):
        raise ValueError(
            f"positions of a {source_grid[0]}x{source_grid[1]} grid are [1, {tokens}, width], "
            f"got {list(pos_embed.shape)}"
        )
    if source_grid == target_grid:
        return pos_embed
    cls, patches = pos_embed[:, :1].float(), pos_embed[:, 1:].float()
    plane = patches.transpose(1, 2).unflatten(-1, source_grid)
    plane = F.interpolate(plane, size=target_grid, mode="bicubic", align_corners=False)
    return torch.cat((cls, plane.flatten(2).transpose(1, 2)), dim=1)


def geometric_ratio(terms: int, reach: int) -> float:
    """q >= 1 with 1 + q + ... + q^(terms-1) = reach; 1 where the terms reach it anyway."""
    if terms < 2 or reach <= terms:
        return 1.0
    low, high = 1.0, float(reach)
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if sum(middle**power for power in range(terms)) > reach:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _axis_weights(source_side: int, target_side: int) -> Tensor:
    """fp64 ``[2 * target - 1, 2 * source - 1]``: from source offsets to target offsets."""
    ratio = geometric_ratio(source_side - 1, target_side - 1)
    steps = torch.tensor([ratio**power for power in range(source_side - 1)], dtype=torch.float64)
    far = steps.cumsum(0)
    knots = torch.cat((-far.flip(0), torch.zeros(1, dtype=torch.float64), far))
    wanted = torch.arange(1 - target_side, target_side, dtype=torch.float64)
    return _spline_weights(knots, wanted.clamp(knots[0].item(), knots[-1].item()))


def _spline_weights(knots: Tensor, wanted: Tensor) -> Tensor:
    """``[W, K]``: values of the not-a-knot cubic spline at ``wanted``, linear in those at knots."""
    count = len(knots)
    if count <= 3:  # too few for a not-a-knot end: the polynomial through all of them
        powers = torch.arange(count, dtype=torch.float64)
        basis = torch.linalg.inv(knots[:, None] ** powers)
        return (wanted[:, None] ** powers) @ basis
    step = knots.diff()
    # Second derivatives at the knots: continuity of the first one inside, of the third one at the
    # second and the last but one knot.
    left = torch.zeros(count, count, dtype=torch.float64)
    right = torch.zeros(count, count, dtype=torch.float64)
    for i in range(1, count - 1):
        before, after = step[i - 1], step[i]
        left[i, i - 1 : i + 2] = torch.stack((before, 2 * (before + after), after))
        right[i, i - 1 : i + 2] = 6 * torch.stack((1 / before, -1 / before - 1 / after, 1 / after))
    left[0, :3] = torch.stack((step[1], -step[0] - step[1], step[0]))
    left[-1, -3:] = torch.stack((step[-1], -step[-1] - step[-2], step[-2]))
    curvature = torch.linalg.solve(left, right)
    piece = (torch.searchsorted(knots, wanted, right=True) - 1).clamp(0, count - 2)
    width = step[piece]
    a = (knots[piece + 1] - wanted) / width
    b = 1 - a
    values = torch.eye(count, dtype=torch.float64)
    bend = ((a**3 - a)[:, None] * curvature[piece] + (b**3 - b)[:, None] * curvature[piece + 1]) * (
        width**2 / 6
    )[:, None]
    return a[:, None] * values[piece] + b[:, None] * values[piece + 1] + bend
