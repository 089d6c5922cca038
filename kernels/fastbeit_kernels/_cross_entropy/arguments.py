"""From tensors to kernel launches.

The operators run the launches made here; the compile report makes the same ones of meta tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._configs import family_of
from .._launch import Launch
from . import configs, rows, sums, tiled_rows, whole_rows
from .configs import LossConfig


def config_of(hidden: Tensor, family: str | None = None) -> LossConfig:
    """Launch choices for hidden's device (or GPU family) and dtype.

    The interpreter takes those of a Hopper's 16-bit kernels for any dtype, so that they are what
    is checked.
    """
    bits = hidden.element_size() * 8
    if family is None and hidden.device.type == "cpu":
        family, bits = "sm_90", 16
    elif family is None:
        family = family_of(torch.cuda.get_device_capability(hidden.device))
    return configs.LOSS[family, bits]


def row_length(classes: int) -> int:
    """Elements from one row of logits to the next: whole groups of 8."""
    return -(-classes // 8) * 8


def _padded(size: int, least: int = 16) -> int:
    return max(least, 1 << (size - 1).bit_length())


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def is_whole(config: LossConfig, classes: int) -> bool:
    return _padded(classes) <= config.whole_row


def _whole_tile(classes: int) -> tuple[int, int, int]:
    """(padded classes, rows, warps) of a tile of whole rows."""
    padded = _padded(classes)
    together = min(configs.WHOLE_ROWS, max(1, configs.WHOLE_TILE // padded))
    elements = configs.WHOLE_ELEMENTS if together == 1 else configs.NARROW_ELEMENTS
    return padded, together, max(1, padded * together // (32 * elements))


def loss_programs(config: LossConfig, total: int, classes: int) -> int:
    """Partial losses: a frozen function of shapes and configuration."""
    if not is_whole(config, classes):
        return min(config.programs, total)
    _, together, warps = _whole_tile(classes)
    return min(config.programs * max(1, 8 // warps), _blocks(total, together))


def dbias_partials(config: LossConfig, total: int, classes: int) -> int:
    if is_whole(config, classes):
        return loss_programs(config, total, classes)
    return min(config.pieces, _blocks(total, configs.SECOND_ROWS))


def gather_launch(
    hidden: Tensor,
    positions: Tensor | None,
    targets: Tensor,
    rows_RD: Tensor,
    labels: Tensor,
    sources: Tensor,
    classes: int,
) -> Launch:
    _, tokens, width = hidden.shape
    image, row, column = hidden.stride()
    # Absent positions are never read, but a kernel needs a pointer.
    named = targets if positions is None else positions
    arguments = {
        "hidden_ptr": hidden,
        "positions_ptr": named,
        "targets_ptr": targets,
        "rows_ptr": rows_RD,
        "labels_ptr": labels,
        "sources_ptr": sources,
        "hidden_image": image,
        "hidden_row": row,
        "hidden_column": column,
        "positions_image": named.stride(0),
        "positions_slot": named.stride(1),
        "targets_image": targets.stride(0),
        "targets_slot": targets.stride(1),
        "tokens": tokens,
        "slots": targets.shape[1],
        "total": targets.numel(),
        "classes": classes,
    }
    constants = {
        "WIDTH": width,
        "ROWS": configs.ROWS,
        "COLUMNS": min(configs.COLUMNS, _padded(width)),
        "POSITIONS": positions is not None,
    }
    grid = _blocks(targets.numel(), configs.ROWS)
    return Launch(rows.gather_rows, arguments, constants, grid, configs.ROW_WARPS, 1)


def scatter_launch(
    product: Tensor, sources: Tensor, dloss: Tensor, count: Tensor, dhidden: Tensor
) -> Launch:
    images, tokens, width = dhidden.shape
    arguments = {
        "product_ptr": product,
        "sources_ptr": sources,
        "dloss_ptr": dloss,
        "count_ptr": count,
        "dhidden_ptr": dhidden,
        "tokens": tokens,
        "slots": sources.numel() // images,
    }
    constants = {
        "WIDTH": width,
        "ROWS": configs.ROWS,
        "COLUMNS": min(configs.COLUMNS, _padded(width)),
        "SLOTS": min(configs.SLOTS, _padded(sources.numel() // images)),
    }
    grid = images * _blocks(tokens, configs.ROWS)
    return Launch(rows.scatter_rows, arguments, constants, grid, configs.ROW_WARPS, 1)


def _flags(logits: Tensor, bias: Tensor | None, smoothing: float, gradient: bool) -> dict[str, Any]:
    return {
        "BIAS": bias is not None,
        "SMOOTHED": smoothing > 0,
        "GRADIENT": gradient,
        "EXACT": logits.dtype == torch.float32,
    }


def whole_launch(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    counts: Tensor,
    dbias: Tensor | None,
    classes: int,
    smoothing: float,
    gradient: bool,
    config: LossConfig,
) -> Launch:
    """One pass over rows that lie in registers."""
    total, row = logits.shape
    padded, together, warps = _whole_tile(classes)
    arguments = {
        "logits_ptr": logits,
        # The same memory, read element by element: apart, as the report wants rows read wide.
        "logit_ptr": logits,
        "bias_ptr": logits if bias is None else bias,
        "labels_ptr": labels,
        "losses_ptr": losses,
        "counts_ptr": counts,
        "dbias_ptr": losses if dbias is None else dbias,
        "total": total,
        "smoothing": smoothing,
    }
    constants = {
        "CLASSES": classes,
        "PADDED": padded,
        "ROW": row,
        "ROWS": together,
        **_flags(logits, bias, smoothing, gradient),
        "BIAS_GRADIENT": dbias is not None,
    }
    grid = loss_programs(config, total, classes)
    # Narrow rows are not worth a cap: their tiles hold more besides the rows.
    cap = config.maxnreg if together == 1 else None
    return Launch(whole_rows.loss_whole_rows, arguments, constants, grid, warps, 1, cap)


def first_launch(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    counts: Tensor,
    scales: Tensor | None,
    classes: int,
    smoothing: float,
    config: LossConfig,
) -> Launch:
    """The first pass over rows that don't: the loss, and ``scales`` for the second."""
    total, row = logits.shape
    arguments = {
        "logits_ptr": logits,
        "bias_ptr": logits if bias is None else bias,
        "labels_ptr": labels,
        "losses_ptr": losses,
        "counts_ptr": counts,
        "scales_ptr": losses if scales is None else scales,
        "total": total,
        "smoothing": smoothing,
    }
    constants = {
        "CLASSES": classes,
        "ROW": row,
        "BLOCK": configs.FIRST_BLOCK,
        **_flags(logits, bias, smoothing, scales is not None),
        "STAGES": configs.FIRST_STAGES,
    }
    grid = loss_programs(config, total, classes)
    return Launch(
        tiled_rows.loss_tiled_rows,
        arguments,
        constants,
        grid,
        configs.FIRST_WARPS,
        configs.FIRST_STAGES,
    )


def second_launch(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scales: Tensor,
    dbias: Tensor | None,
    classes: int,
    smoothing: float,
    gradient: bool,
    config: LossConfig,
) -> Launch:
    """The second pass: the gradient over the logits, and its partial sums for the bias."""
    total, row = logits.shape
    pieces = dbias_partials(config, total, classes)
    arguments = {
        "logits_ptr": logits,
        "bias_ptr": logits if bias is None else bias,
        "labels_ptr": labels,
        "scales_ptr": scales,
        "dbias_ptr": scales if dbias is None else dbias,
        "total": total,
        "smoothing": smoothing,
        "pieces": pieces,
    }
    constants = {
        "CLASSES": classes,
        "ROW": row,
        "BLOCK": configs.SECOND_BLOCK,
        "ROWS": configs.SECOND_ROWS,
        **_flags(logits, bias, smoothing, gradient),
        "BIAS_GRADIENT": dbias is not None,
    }
    grid = pieces * _blocks(classes, configs.SECOND_BLOCK)
    warps = configs.second_warps(logits.element_size())
    return Launch(tiled_rows.gradient_tiles, arguments, constants, grid, warps, 1)


def sum_launch(
    losses: Tensor,
    counts: Tensor,
    partials: Tensor | None,
    loss: Tensor,
    correct: Tensor,
    count: Tensor,
    dbias: Tensor | None,
) -> Launch:
    columns = 0 if partials is None else partials.shape[1]
    arguments = {
        "losses_ptr": losses,
        "counts_ptr": counts,
        "dbias_partials_ptr": losses if partials is None else partials,
        "loss_ptr": loss,
        "correct_ptr": correct,
        "count_ptr": count,
        "dbias_ptr": loss if dbias is None else dbias,
        "programs": losses.numel(),
        "partials": 0 if partials is None else partials.shape[0],
        "row": columns,
    }
    constants = {
        "PROGRAMS": _padded(losses.numel()),
        "ROWS": configs.SUM_ROWS,
        "COLUMNS": configs.SUM_COLUMNS,
    }
    grid = 1 + _blocks(columns, configs.SUM_COLUMNS)
    return Launch(sums.sum_partials, arguments, constants, grid, configs.SUM_WARPS, 1)


def scale_launch(product: Tensor, dloss: Tensor, count: Tensor, out: Tensor) -> Launch:
    arguments = {
        "product_ptr": product,
        "dloss_ptr": dloss,
        "count_ptr": count,
        "out_ptr": out,
        "elements": out.numel(),
    }
    grid = _blocks(out.numel(), configs.SCALE_BLOCK)
    constants = {"BLOCK": configs.SCALE_BLOCK}
    return Launch(sums.scale_gradient, arguments, constants, grid, configs.SCALE_WARPS, 1)
