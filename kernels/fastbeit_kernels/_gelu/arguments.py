"""From tensors to kernel launches.

The operators run the launches made here; the compile report makes the same ones of meta tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._configs import family_of
from .._launch import Launch
from . import kernels
from .configs import GELU, GeluConfig, columns_of, stretches_of

SUM_COLUMNS = 32
SUM_SHARES = 64


def config_of(tensor: Tensor, family: str | None = None) -> GeluConfig:
    """Launch choices for a tensor's device (or GPU family); the interpreter takes a Hopper's."""
    if family is None and tensor.device.type == "cpu":
        family = "sm_90"
    elif family is None:
        family = family_of(torch.cuda.get_device_capability(tensor.device))
    return GELU[family]


def rows_of(tensor: Tensor) -> Tensor:
    """``[..., N]`` → ``[R, N]`` with rows in one piece each: a view where the memory allows one."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _constants(
    x: Tensor, bias: Tensor | None, rows: int, config: GeluConfig
) -> dict[str, int | bool]:
    return {
        "BIAS": bias is not None,
        "EXACT": x.dtype == torch.float32,
        "ROWS": rows,
        "COLUMNS": columns_of(config, x.shape[1], x.element_size()),
    }


def forward_launch(x: Tensor, bias: Tensor | None, out: Tensor, config: GeluConfig) -> Launch:
    """x ``[R, N]`` as :func:`rows_of` gives it, bias ``[N]`` contiguous; out contiguous."""
    rows, width = x.shape
    constants = _constants(x, bias, config.forward_rows, config)
    arguments = {
        "x_ptr": x,
        # An absent tensor is never read, but a kernel needs a pointer.
        "bias_ptr": x if bias is None else bias,
        "out_ptr": out,
        "x_row": x.stride(0),
        "rows": rows,
        "width": width,
    }
    grid = -(-rows // config.forward_rows) * -(-width // constants["COLUMNS"])
    return Launch(kernels.bias_gelu_forward, arguments, constants, grid, config.warps, 1)


def stretches(x: Tensor, config: GeluConfig) -> int:
    """Shares of dbias that the backward kernel writes."""
    rows, width = x.shape
    return stretches_of(config, rows, width, columns_of(config, width, x.element_size()))


def backward_launch(
    dout: Tensor,
    x: Tensor,
    bias: Tensor | None,
    dx: Tensor,
    shares: Tensor | None,
    config: GeluConfig,
) -> Launch:
    """``shares`` is fp32 ``[stretches, N]``, or None where nobody asks for dbias."""
    rows, width = x.shape
    count = stretches(x, config)
    assert shares is None or shares.shape == (count, width)
    constants = _constants(x, bias, config.backward_rows, config)
    if shares is not None and bias is not None and bias.dtype == torch.float32:
        constants["EXACT"] = True  # dbias is in fp32, whatever dx is rounded to
    constants |= {
        "BIAS_GRADIENT": shares is not None,
        "STAGES": config.stages,
    }
    arguments = {
        "dout_ptr": dout,
        "x_ptr": x,
        "bias_ptr": x if bias is None else bias,
        "dx_ptr": dx,
        "shares_ptr": dx if shares is None else shares,
        "dout_row": dout.stride(0),
        "x_row": x.stride(0),
        "rows": rows,
        "width": width,
        "stretch": -(-rows // count),
    }
    grid = count * -(-width // constants["COLUMNS"])
    kernel = kernels.bias_gelu_backward
    return Launch(kernel, arguments, constants, grid, config.warps, config.stages)


def sum_launch(shares: Tensor, dbias: Tensor) -> Launch:
    count, width = shares.shape
    arguments = {"shares_ptr": shares, "dbias_ptr": dbias, "width": width, "shares": count}
    constants = {"COLUMNS": SUM_COLUMNS, "SHARES": SUM_SHARES}
    return Launch(kernels.column_sums, arguments, constants, -(-width // SUM_COLUMNS), 4, 1)
