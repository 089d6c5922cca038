"""From tensors to kernel launches.

The operators run the launches made here; the compile report makes the same ones of meta tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._configs import family_of
from .._launch import Launch
from . import backward, forward
from .configs import (
    LayerNormConfig,
    RowTile,
    layer_norm_config,
    programs_of,
    row_tile,
    stages_of,
)

SUM_COLUMNS = 16
SUM_PROGRAMS = 512
SUM_WARPS = 8


def config_of(tensor: Tensor, family: str | None = None) -> LayerNormConfig:
    """Launch choices for a tensor's device (or GPU family); the interpreter takes a Hopper's."""
    if family is None and tensor.device.type == "cpu":
        family = "sm_90"
    elif family is None:
        family = family_of(torch.cuda.get_device_capability(tensor.device))
    return layer_norm_config(family)


def rows_contiguous(tensor_BTD: Tensor) -> Tensor:
    """The tensor itself wherever each row lies in one piece; rows may lie anywhere."""
    return tensor_BTD if tensor_BTD.stride(-1) == 1 else tensor_BTD.contiguous()


def strides(name: str, tensor_BTD: Tensor | None) -> dict[str, int]:
    if tensor_BTD is None:
        return {f"{name}_image": 0, f"{name}_token": 0}
    image, token, element = tensor_BTD.stride()
    assert element == 1 or tensor_BTD.shape[-1] == 1, f"{name} must have contiguous rows"
    return {f"{name}_image": image, f"{name}_token": token}


def widest(*tensors: Tensor | None) -> int:
    """Bytes of the widest element: it gets the 16-byte loads and stores, a narrower one less."""
    return max(tensor.element_size() for tensor in tensors if tensor is not None)


def _tile_constants(width: int, tile: RowTile) -> dict[str, int]:
    return {"WIDTH": width, "ROWS": tile.rows, "COLUMNS": tile.columns, "PIECES": tile.pieces}


def forward_launch(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    y: Tensor | None,
    normed: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    config: LayerNormConfig,
) -> Launch:
    """x and branch ``[B, T, D]`` of contiguous rows; y without branch, the norm's without weight:
    None."""
    batch, tokens, width = x.shape
    tile = row_tile(width, widest(x, branch), config.forward)

    # Absent tensors are never touched, but a kernel needs a pointer.
    def pointer(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor

    arguments = {
        "x_ptr": x,
        "branch_ptr": pointer(branch),
        "gamma_ptr": pointer(gamma),
        "drop_ptr": pointer(drop_scale),
        "weight_ptr": pointer(weight),
        "bias_ptr": pointer(bias),
        "y_ptr": pointer(y),
        "normed_ptr": pointer(normed),
        "mean_ptr": pointer(mean),
        "rstd_ptr": pointer(rstd),
        **strides("x", x),
        **strides("branch", branch),
        "drop_image": 0 if drop_scale is None else drop_scale.stride(0),
        "total": batch * tokens,
        "tokens": tokens,
        "eps": eps,
    }
    constants = {
        "BRANCH": branch is not None,
        "GAMMA": gamma is not None,
        "DROP": drop_scale is not None,
        "NORM": weight is not None,
        "BIAS": bias is not None,
        **_tile_constants(width, tile),
    }
    grid = -(-batch * tokens // tile.rows)
    return Launch(forward.residual_norm_forward, arguments, constants, grid, tile.warps, 1)


def backward_tile(config: LayerNormConfig, *rows_BTD: Tensor | None) -> RowTile:
    width = next(tensor.shape[-1] for tensor in rows_BTD if tensor is not None)
    return row_tile(width, widest(*rows_BTD), config.backward)


def partials_shape(
    config: LayerNormConfig, tile: RowTile, rows_BTD: Tensor, parameters: int
) -> tuple[int, int, int]:
    """[programs, parameters whose gradient is wanted, D]"""
    batch, tokens, width = rows_BTD.shape
    return programs_of(config, batch * tokens, tile), parameters, width


def backward_launch(
    dy: Tensor | None,
    dnormed: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    dx: Tensor | None,
    dbranch: Tensor | None,
    dgamma: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    partials: Tensor | None,
    config: LayerNormConfig,
) -> Launch:
    """Gradients that aren't wanted, and those that didn't come, are None."""
    came = dy if dnormed is None else dnormed
    assert came is not None, "one of dy and dnormed must be given"
    batch, tokens, width = came.shape
    tile = backward_tile(config, dy, dnormed, y, branch, dx, dbranch)
    read = [tensor for tensor in (dy, dnormed, y, branch) if tensor is not None]
    row_bytes = sum(tensor.element_size() for tensor in read) * tile.columns * tile.pieces

    def pointer(tensor: Tensor | None) -> Tensor:
        return came if tensor is None else tensor

    arguments = {
        "dy_ptr": pointer(dy),
        "dnormed_ptr": pointer(dnormed),
        "y_ptr": pointer(y),
        "mean_ptr": pointer(mean),
        "rstd_ptr": pointer(rstd),
        "weight_ptr": pointer(weight),
        "branch_ptr": pointer(branch),
        "gamma_ptr": pointer(gamma),
        "drop_ptr": pointer(drop_scale),
        "dx_ptr": pointer(dx),
        "dbranch_ptr": pointer(dbranch),
        "partials_ptr": pointer(partials),
        **strides("dy", dy),
        **strides("dnormed", dnormed),
        **strides("y", y),
        **strides("branch", branch),
        "drop_image": 0 if drop_scale is None else drop_scale.stride(0),
        "total": batch * tokens,
        "tokens": tokens,
    }
    constants = {
        "DY": dy is not None,
        "NORM": dnormed is not None,
        "GAMMA": gamma is not None,
        "DROP": drop_scale is not None,
        "DX": dx is not None,
        "DBRANCH": dbranch is not None,
        "DGAMMA": dgamma is not None,
        "DWEIGHT": dweight is not None,
        "DBIAS": dbias is not None,
        **_tile_constants(width, tile),
        "STAGES": stages_of(config, row_bytes * tile.rows),
    }
    grid = programs_of(config, batch * tokens, tile)
    return Launch(
        backward.residual_norm_backward, arguments, constants, grid, tile.warps, constants["STAGES"]
    )


def sum_launch(
    partials: Tensor, dgamma: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> Launch:
    """``partials [programs, wanted parameters, D]`` → the gradients."""
    programs, parameters, width = partials.shape

    def pointer(tensor: Tensor | None) -> Tensor:
        return partials if tensor is None else tensor

    arguments = {
        "partials_ptr": partials,
        "dgamma_ptr": pointer(dgamma),
        "dweight_ptr": pointer(dweight),
        "dbias_ptr": pointer(dbias),
        "programs": programs,
    }
    constants = {
        "DGAMMA": dgamma is not None,
        "DWEIGHT": dweight is not None,
        "DBIAS": dbias is not None,
        "WIDTH": width,
        "COLUMNS": SUM_COLUMNS,
        "PROGRAMS": min(SUM_PROGRAMS, 1 << (programs - 1).bit_length()),
    }
    grid = parameters * -(-width // SUM_COLUMNS)
    return Launch(backward.parameter_sums, arguments, constants, grid, SUM_WARPS, 1)
