"""The registered operator of ``linear_argmax``, and how tensors become kernel arguments.

It has no gradient: its result is integers, and autograd stops there by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._configs import family_of
from .._dispatch import on_device
from .._launch import Launch
from .._operators import NAMESPACE
from . import configs, kernels
from .configs import ProductTile


def tile_for(x: Tensor, family: str | None = None) -> ProductTile:
    """Launch choices for x's device (or GPU family) and dtype; interpreted: a Hopper's."""
    bits = x.element_size() * 8
    if family is None and x.device.type == "cpu":
        family, bits = "sm_90", 16
    elif family is None:
        family = family_of(torch.cuda.get_device_capability(x.device))
    return configs.TILES[family, bits]


def product_launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, best: Tensor, column: Tensor, tile: ProductTile
) -> Launch:
    """x, weight of one dtype, as :func:`wide_rows` gives them → best, column ``[tiles, R]``."""
    (rows, depth), classes = x.shape, weight.shape[0]
    arguments = {
        "x_ptr": x,
        "w_ptr": weight,
        # An absent tensor is never read, but a kernel needs a pointer.
        "bias_ptr": best if bias is None else bias,
        "best_ptr": best,
        "column_ptr": column,
        "x_row_8": x.stride(0) // 8,
        "w_row_8": weight.stride(0) // 8,
        "rows": rows,
        "classes": classes,
        "depth_8": depth // 8,
    }
    constants = {
        "BIAS": bias is not None,
        "WHOLE_DEPTH": depth % tile.depth == 0,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": max(1, configs.GROUP_ROWS // tile.rows),
    }
    grid = -(-rows // tile.rows) * -(-classes // tile.columns)
    return Launch(kernels.argmax_tiles, arguments, constants, grid, tile.warps, tile.stages)


def reduction_launch(best: Tensor, column: Tensor, codes: Tensor) -> Launch:
    tiles, rows = best.shape
    arguments = {
        "best_ptr": best,
        "column_ptr": column,
        "codes_ptr": codes,
        "rows": rows,
        "tiles": tiles,
    }
    constants = {"TILES": configs.REDUCED_TILES, "ROWS": configs.REDUCED_ROWS}
    grid = -(-rows // configs.REDUCED_ROWS)
    return Launch(
        kernels.argmax_of_tiles, arguments, constants, grid, configs.REDUCED_WARPS, stages=1
    )


def wide_rows(tensor: Tensor) -> Tensor:
    """``[R, D]`` whose rows can be read 16 bytes at a time: the tensor itself wherever its rows lie
    so, views too; or a copy with D padded to a multiple of 8 with zeros."""
    rows, depth = tensor.shape
    row, element = tensor.stride()
    if element == 1 and row % 8 == depth % 8 == tensor.data_ptr() % 16 == 0:
        return tensor
    copy = tensor.new_zeros(rows, -(-depth // 8) * 8)
    copy[:, :depth] = tensor
    return copy


@torch.library.custom_op(f"{NAMESPACE}::linear_argmax", mutates_args=())
def argmax_operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight = wide_rows(x), wide_rows(weight)
    if bias is not None:
        bias = bias.contiguous()
    rows, tile = x.shape[0], tile_for(x)
    tiles = -(-weight.shape[0] // tile.columns)
    best = torch.empty(tiles, rows, dtype=torch.float32, device=x.device)
    column = torch.empty(tiles, rows, dtype=torch.int32, device=x.device)
    codes = torch.empty(rows, dtype=torch.int64, device=x.device)
    with on_device(x):
        product_launch(x, weight, bias, best, column, tile).run()
        reduction_launch(best, column, codes).run()
    return codes


@argmax_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The public function of that name, on Triton; arguments are checked.

    The weight comes in x's dtype, cast here, outside the operator, so that a compiled graph can
    share the copy. Autocast changes nothing: nothing here is a product that it knows.
    """
    bias = None if bias is None else bias.detach()
    return argmax_operator(x.detach(), weight.detach().to(x.dtype), bias)
