"""The registered operators of ``expand_rel_pos_bias``, and how tensors become kernel arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch import on_device
from .._launch import Launch
from .._operators import NAMESPACE, refuse_second_derivative
from . import kernels

COLUMNS = 256
PLACES = 128
WARPS = 4


def _heads_padded(heads: int) -> int:
    return 1 << (heads - 1).bit_length()


def _empty_bias(heads: int, tokens: int, device: torch.device) -> Tensor:
    """``[H, T, T]`` with memory rows a multiple of 8 long, their ends allocated too."""
    padded = -(-tokens // 8) * 8
    memory = torch.empty(heads, tokens, padded, dtype=torch.float32, device=device)
    return memory[..., :tokens]


def expand_launch(table: Tensor, index: Tensor, bias: Tensor) -> Launch:
    tokens, heads = index.shape[0], table.shape[1]
    arguments = {
        "table_ptr": table,
        "index_ptr": index,
        "bias_ptr": bias,
        "table_row": table.stride(0),
        "table_head": table.stride(1),
        "index_row": index.stride(0),
        "index_column": index.stride(1),
        "tokens": tokens,
        "bias_row": bias.stride(1),
        "heads": heads,
    }
    constants = {"HEADS": _heads_padded(heads), "COLUMNS": COLUMNS}
    grid = tokens * -(-tokens // COLUMNS)
    return Launch(kernels.expand_table, arguments, constants, grid, WARPS, 1)


def reduce_launch(
    dbias: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    dtable: Tensor,
    grid: tuple[int, int],
) -> Launch:
    rows, heads = dtable.shape
    head_step, row_step, column_step = dbias.stride()
    # Absent tensors are never read, but a kernel needs a pointer.
    arguments = {
        "dbias_ptr": dbias,
        "order_ptr": dbias if order is None else order,
        "starts_ptr": dbias if starts is None else starts,
        "dtable_ptr": dtable,
        "dbias_head": head_step,
        "dbias_row": row_step,
        "dbias_column": column_step,
        "tokens": dbias.shape[1],
        "rows": rows,
        "heads": heads,
    }
    constants = {
        "HEADS": _heads_padded(heads),
        "BLOCK": PLACES,
        "HEIGHT": grid[0],
        "WIDTH": grid[1],
    }
    return Launch(kernels.reduce_to_table, arguments, constants, rows, WARPS, 1)


@torch.library.custom_op(f"{NAMESPACE}::expand_forward", mutates_args=())
def expand_forward(table: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    bias = _empty_bias(table.shape[1], index.shape[0], table.device)
    with on_device(table):
        expand_launch(table, index, bias).run()
    return bias


@expand_forward.register_fake
def _(table: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    tokens = index.shape[0]
    padded = -(-tokens // 8) * 8
    return torch.empty_strided(
        (table.shape[1], tokens, tokens),
        (tokens * padded, padded, 1),
        dtype=torch.float32,
        device=table.device,
    )


@torch.library.custom_op(f"{NAMESPACE}::expand_backward", mutates_args=())
def expand_backward(
    dbias: Tensor, index: Tensor, rows: int, dtype: torch.dtype, height: int, width: int
) -> Tensor:
    """height 0: any index. Otherwise that of a height x width grid, and it is not read."""
    dtable = torch.empty(rows, dbias.shape[0], dtype=dtype, device=dbias.device)
    order = starts = None
    if height == 0:
        ascending, order = index.flatten().long().sort(stable=True)
        starts = torch.searchsorted(ascending, torch.arange(rows + 1, device=index.device))
    with on_device(dbias):
        reduce_launch(dbias, order, starts, dtable, (height, width)).run()
    return dtable


@expand_backward.register_fake
def _(
    dbias: Tensor, index: Tensor, rows: int, dtype: torch.dtype, height: int, width: int
) -> Tensor:
    return dbias.new_empty(rows, dbias.shape[0], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, index, ctx.height, ctx.width = inputs
    ctx.save_for_backward(index)
    ctx.rows, ctx.dtype = table.shape[0], table.dtype


def _table_gradient(ctx: Any, dbias: Tensor) -> tuple[Tensor, None, None, None]:
    (index,) = ctx.saved_tensors
    dtable = expand_backward(dbias, index, ctx.rows, ctx.dtype, ctx.height, ctx.width)
    return dtable, None, None, None


expand_forward.register_autograd(_table_gradient, setup_context=_save)


refuse_second_derivative("expand_rel_pos_bias", expand_backward)


def expand_rel_pos_bias(table: Tensor, index: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """The public function of that name, on Triton; arguments are checked."""
    height, width = grid or (0, 0)
    if table.shape[0] != (2 * height - 1) * (2 * width - 1) + 3:
        # Another table than a grid's: go by the index.
        height, width = 0, 0
    return expand_forward(table, index, height, width)
