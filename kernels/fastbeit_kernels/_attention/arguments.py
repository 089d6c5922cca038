"""From tensors to kernel launches.

The operators run the launches made here; the compile report makes the same ones of meta tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._configs import (
    AttentionConfig,
    Tile,
    attention_config,
    bias_slices,
    family_of,
    whole_row_tile,
)
from .._launch import Launch
from . import backward_keys, backward_queries, forward, forward_rows

SUM_BLOCK = 1024


def padded_width(width: int) -> int:
    """The next power of two, 16 at least (the shortest side of a tensor-core product)."""
    return max(16, 1 << (width - 1).bit_length())


def config_of(q: Tensor, family: str | None = None) -> AttentionConfig:
    """Launch choices for q's device (or GPU family), dtype and head width.

    The interpreter has no registers to run out of: it takes the tiles of a Hopper's 16-bit kernels
    for any dtype, so that they are what is checked.
    """
    bits = q.element_size() * 8
    if family is None and q.device.type == "cpu":
        family, bits = "sm_90", 16
    elif family is None:
        family = family_of(torch.cuda.get_device_capability(q.device))
    return attention_config(family, bits, padded_width(q.shape[-1]))


def tail_of(keys: int, columns: int) -> int:
    """Width of the last, partial key tile: a power of two, 16 at least, 0 where there is none."""
    left = keys % columns
    return 0 if left == 0 else max(16, 1 << (left - 1).bit_length())


def strides(name: str, tensor_BTHd: Tensor) -> dict[str, int]:
    image, token, head, element = tensor_BTHd.stride()
    assert element == 1 or tensor_BTHd.shape[-1] == 1, f"{name} must have contiguous head rows"
    return {f"{name}_image": image, f"{name}_token": token, f"{name}_head": head}


def bias_strides(bias: Tensor | None) -> dict[str, int]:
    """Strides in units of 8 elements, zero along broadcast dimensions."""
    if bias is None:
        return {"bias_image_8": 0, "bias_head_8": 0, "bias_row_8": 0}
    steps = [
        0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)
    ]
    assert all(step % 8 == 0 for step in steps[:3]), "bias rows must be padded to 8"
    return dict(
        zip(("bias_image_8", "bias_head_8", "bias_row_8"), (s // 8 for s in steps), strict=False)
    )


def _constants(q: Tensor, bias: Tensor | None, positions: Tensor | None) -> dict[str, Any]:
    width = q.shape[-1]
    return {
        "WIDTH": width,
        "PADDED_WIDTH": padded_width(width),
        "BIAS": bias is not None,
        "POSITIONS": positions is not None,
        "EXACT": q.dtype == torch.float32,
    }


def _blocks(tile: Tile, keys: int) -> dict[str, int]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "TAIL": tail_of(keys, tile.columns)}


def _launch(
    kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], grid: int, tile: Tile
) -> Launch:
    return Launch(kernel, arguments, constants, grid, tile.warps, tile.stages, tile.maxnreg)


def _row_programs(q: Tensor, tile: Tile) -> int:
    return -(-q.shape[1] // tile.rows) * q.shape[2] * q.shape[0]


def forward_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    config: AttentionConfig,
) -> Launch:
    """q, k, v, bias as the operators take them (``ops.py``) → the launch of one forward kernel."""
    keys = k.shape[1]
    # Absent tensors are never read, but a kernel needs a pointer.
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": q if bias is None else bias,
        "positions_ptr": lse if positions is None else positions,
        "out_ptr": out,
        "lse_ptr": lse,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **bias_strides(bias),
        "heads": q.shape[2],
        "queries": q.shape[1],
        "keys": keys,
        "scale": scale,
    }
    tile, kernel = config.forward, forward.attention_forward
    constants = _constants(q, bias, positions)
    whole_row = whole_row_tile(config, keys)
    if whole_row is not None:
        tile, kernel = whole_row, forward_rows.attention_forward_rows
        constants["BLOCKS"] = keys // tile.columns
    constants |= _blocks(tile, keys)
    return _launch(kernel, arguments, constants, _row_programs(q, tile), tile)


def query_gradient_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dq: Tensor,
    delta: Tensor,
    scale: float,
    config: AttentionConfig,
) -> Launch:
    keys, tile = k.shape[1], config.queries
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": q if bias is None else bias,
        "positions_ptr": lse if positions is None else positions,
        "out_ptr": out,
        "lse_ptr": lse,
        "dout_ptr": dout,
        "dq_ptr": dq,
        "delta_ptr": delta,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("dout", dout),
        **strides("dq", dq),
        **bias_strides(bias),
        "heads": q.shape[2],
        "queries": q.shape[1],
        "keys": keys,
        "scale": scale,
    }
    constants = _constants(q, bias, positions) | _blocks(tile, keys)
    kernel = backward_queries.attention_backward_queries
    return _launch(kernel, arguments, constants, _row_programs(q, tile), tile)


def key_gradient_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias_slices: Tensor | None,
    scale: float,
    config: AttentionConfig,
) -> Launch:
    """``dbias_slices`` is fp32 ``[slices, H, rows, keys padded to 8]``, or None."""
    batch, keys, heads = k.shape[:3]
    tile = config.keys
    slices = batch if dbias_slices is None else dbias_slices.shape[0]
    assert strides("", dk) == strides("", dv), "dk and dv must be laid out alike"
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "bias_ptr": q if bias is None else bias,
        "positions_ptr": lse if positions is None else positions,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "dout_ptr": dout,
        "dk_ptr": dk,
        "dv_ptr": dv,
        "dbias_ptr": lse if dbias_slices is None else dbias_slices,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("dout", dout),
        **strides("dkv", dk),
        **bias_strides(bias),
        "bias_rows_all": 0 if dbias_slices is None else dbias_slices.shape[2],
        "batch": batch,
        "slices": slices,
        "heads": heads,
        "queries": q.shape[1],
        "keys": keys,
        "scale": scale,
    }
    constants = _constants(q, bias, positions) | {
        "BIAS_GRADIENT": dbias_slices is not None,
        "COLUMNS": tile.columns,
        "ROWS": tile.rows,
    }
    grid = -(-keys // tile.columns) * heads * slices
    kernel = backward_keys.attention_backward_keys
    return _launch(kernel, arguments, constants, grid, tile)


def bias_sum_launch(dbias_slices: Tensor, dbias: Tensor) -> Launch:
    """``[slices, ...]`` → ``[1, ...]``."""
    arguments = {
        "slices_ptr": dbias_slices,
        "dbias_ptr": dbias,
        "elements": dbias.numel(),
        "slices": dbias_slices.shape[0],
    }
    grid = -(-dbias.numel() // SUM_BLOCK)
    return Launch(backward_keys.bias_gradient_sum, arguments, {"BLOCK": SUM_BLOCK}, grid, 4, 1)


def slices_for(bias: Tensor, k: Tensor, config: AttentionConfig) -> int:
    """An image's own bias has its own slice; a shared one the frozen number."""
    batch, keys, heads = k.shape[:3]
    return batch if bias.shape[0] > 1 else bias_slices(config, batch, heads, keys)
