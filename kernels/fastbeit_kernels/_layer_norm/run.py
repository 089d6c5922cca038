"""Forward and backward of residual and norm from tensors to launches, in the order they run."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import on_device
from . import arguments
from .arguments import rows_contiguous


def like(tensor_BTD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """New contiguous memory, whatever the strides of ``tensor``."""
    return torch.empty(tensor_BTD.shape, dtype=dtype or tensor_BTD.dtype, device=tensor_BTD.device)


def vector(tensor_D: Tensor | None) -> Tensor | None:
    return None if tensor_D is None else tensor_D.contiguous()


def run_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(y, normed, mean, rstd): no y without a branch, the others not without a weight."""
    y = None if branch is None else like(x)
    normed = mean = rstd = None
    if weight is not None:
        normed = like(x)
        mean, rstd = (
            torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2)
        )
    launch = arguments.forward_launch(
        rows_contiguous(x),
        None if branch is None else rows_contiguous(branch),
        vector(weight),
        vector(bias),
        eps,
        vector(gamma),
        drop_scale,
        y,
        normed,
        mean,
        rstd,
        arguments.config_of(x),
    )
    with on_device(x):
        launch.run()
    return y, normed, mean, rstd


def run_backward(
    dy: Tensor | None,
    dnormed: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_scale: Tensor | None,
    x_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
    gamma_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Those gradients that a dtype is given for, in the order of the dtypes."""
    came = dy if dnormed is None else dnormed
    assert came is not None
    dy, dnormed, y, branch = (
        None if tensor is None else rows_contiguous(tensor) for tensor in (dy, dnormed, y, branch)
    )
    found = gradients_like(came, x_dtype, branch_dtype, gamma_dtype, weight_dtype, bias_dtype)
    dx, dbranch, dgamma, dweight, dbias = found
    config = arguments.config_of(came)
    partials = None
    wanted = sum(gradient is not None for gradient in (dgamma, dweight, dbias))
    if wanted:
        tile = arguments.backward_tile(config, dy, dnormed, y, branch, dx, dbranch)
        shape = arguments.partials_shape(config, tile, came, wanted)
        partials = torch.empty(shape, dtype=torch.float32, device=came.device)
    launch = arguments.backward_launch(
        dy,
        dnormed,
        y,
        mean,
        rstd,
        vector(weight),
        branch,
        vector(gamma),
        drop_scale,
        dx,
        dbranch,
        dgamma,
        dweight,
        dbias,
        partials,
        config,
    )
    with on_device(came):
        launch.run()
        if partials is not None:
            arguments.sum_launch(partials, dgamma, dweight, dbias).run()
    return [gradient for gradient in found if gradient is not None]


def gradients_like(
    came_BTD: Tensor,
    x_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
    gamma_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor | None]:
    """Memory for [dx, dbranch, dgamma, dweight, dbias]; None for those that no dtype asks for."""
    rows = [None if dtype is None else like(came_BTD, dtype) for dtype in (x_dtype, branch_dtype)]
    width = came_BTD.shape[-1]
    return rows + [
        None if dtype is None else torch.empty(width, dtype=dtype, device=came_BTD.device)
        for dtype in (gamma_dtype, weight_dtype, bias_dtype)
    ]
