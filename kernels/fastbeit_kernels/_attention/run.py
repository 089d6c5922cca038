"""Forward and backward of attention from allocated tensors to launches, in the order they run."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import on_device
from . import arguments


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself wherever its head rows lie in one piece, as they do in packed qkv."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read: Tensor | None,
    positions: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, width = q.shape
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    out = torch.empty(batch, queries, heads, width, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    config = arguments.config_of(q)
    with on_device(q):
        arguments.forward_launch(q, k, v, read, positions, out, lse, scale, config).run()
    return out, lse


def run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    read: Tensor | None,
    positions: Tensor | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    bias_gradient: bool,
) -> Tensor:
    """Fill dq, dk, dv; return dBias fp32 ``[B or 1, H, rows, padded keys]``, or an empty tensor."""
    config = arguments.config_of(q)
    dout, q, k, v = (rows_contiguous(x) for x in (dout, q, k, v))
    delta = torch.empty_like(lse)
    slices = None
    if bias_gradient:
        assert read is not None
        slices = torch.empty(
            arguments.slices_for(read, k, config),
            *bias_gradient_shape(q, k, read, positions)[1:],
            dtype=torch.float32,
            device=q.device,
        )
    with on_device(q):
        arguments.query_gradient_launch(
            q, k, v, read, positions, out, lse, dout, dq, delta, scale, config
        ).run()
        arguments.key_gradient_launch(
            q, k, v, read, positions, lse, delta, dout, dk, dv, slices, scale, config
        ).run()
        if slices is None or read is None:
            return torch.empty(0, dtype=torch.float32, device=q.device)
        if read.shape[0] > 1 or slices.shape[0] == 1:
            return slices
        dbias = torch.empty_like(slices[:1])
        arguments.bias_sum_launch(slices, dbias).run()
    return dbias


def bias_gradient_shape(
    q: Tensor, k: Tensor, read: Tensor, positions: Tensor | None
) -> tuple[int, int, int, int]:
    rows = q.shape[1] if positions is None else read.shape[2]
    return (read.shape[0], q.shape[2], rows, -(-k.shape[1] // 8) * 8)


def reduce_bias_gradient(dbias: Tensor, shape: torch.Size, dtype: torch.dtype, keys: int) -> Tensor:
    """What the kernels give, summed along the bias's broadcast dimensions (rare), in its dtype."""
    return dbias[..., :keys].sum_to_size(shape).to(dtype)
