"""From tensors to kernel launches.

The operators run the launches made here; the compile report makes the same ones of meta tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._configs import family_of
from .._launch import Launch
from . import backward, configs, forward, order
from .configs import EmbeddingConfig, ProductTile
from .geometry import Geometry

ELEMENTS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def config_of(
    device: torch.device, dtype: torch.dtype, family: str | None = None
) -> EmbeddingConfig:
    """Launch choices for a device (or GPU family) and the projection's dtype; interpreted: a
    Hopper's for 16 bits."""
    bits = dtype.itemsize * 8
    if family is None and device.type == "cpu":
        family, bits = "sm_90", 16
    elif family is None:
        family = family_of(torch.cuda.get_device_capability(device))
    return configs.CONFIGS[family, bits]


def shares_for(config: EmbeddingConfig, width: int, geometry: Geometry) -> int:
    """Shares that the weight's gradient is summed in: a frozen function of shapes."""
    tile = config.weight
    tiles = -(-width // tile.rows) * -(-geometry.pixels // tile.columns)
    return max(1, min(geometry.batch, config.weight_programs // tiles))


def mark_launch(positions: Tensor, hidden: Tensor, count: Tensor) -> Launch:
    """positions int32 ``[B, M]`` → hidden int32 ``[B, N]``, count int32 ``[B]``."""
    arguments = {
        "positions_ptr": positions,
        "flags_ptr": hidden,
        "count_ptr": count,
        "slots": positions.shape[1],
        "patches": hidden.shape[1],
    }
    constants = {"BLOCK": configs.ORDER_BLOCK}
    return Launch(order.mark_hidden, arguments, constants, hidden.shape[0], configs.ORDER_WARPS, 1)


def order_launch(hidden: Tensor, count: Tensor, listed: Tensor, visible: Tensor) -> Launch:
    """→ listed int32 ``[B * (N + 1)]``, visible int32 ``[1]``."""
    arguments = {
        "flags_ptr": hidden,
        "count_ptr": count,
        "order_ptr": listed,
        "visible_ptr": visible,
        "batch": hidden.shape[0],
        "patches": hidden.shape[1],
    }
    constants = {"BLOCK": configs.ORDER_BLOCK}
    return Launch(order.order_tokens, arguments, constants, hidden.shape[0], configs.ORDER_WARPS, 1)


def _tile(tile: ProductTile) -> dict[str, int]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}


def forward_launch(
    images: Tensor,
    read: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    mask_token: Tensor | None,
    pos_embed: Tensor | None,
    listed: Tensor | None,
    visible: Tensor | None,
    out: Tensor,
    geometry: Geometry,
    config: EmbeddingConfig,
) -> Launch:
    """``read`` as ``geometry.readable_weight`` gives it; the mask token goes with the list."""
    assert (listed is None) == (visible is None) == (mask_token is None)
    # Absent tensors are never read, but a kernel needs a pointer.
    arguments = {
        "images_ptr": images,
        "read_ptr": read,
        "bias_ptr": read if bias is None else bias,
        "cls_ptr": cls_token,
        "mask_ptr": read if mask_token is None else mask_token,
        "pos_ptr": read if pos_embed is None else pos_embed,
        "order_ptr": read if listed is None else listed,
        "visible_ptr": read if visible is None else visible,
        "out_ptr": out,
        **geometry.arguments(),
        "width": out.shape[2],
    }
    tile = config.forward_tile(
        wide_images=images.element_size() > read.element_size(), positions=pos_embed is not None
    )
    constants = {
        **geometry.constants(),
        "BIAS": bias is not None,
        "MASKED": listed is not None,
        "POSITIONS": pos_embed is not None,
        **_tile(tile),
    }
    grid = -(-geometry.batch * geometry.tokens // tile.rows) * -(-out.shape[2] // tile.columns)
    return Launch(forward.embed_tokens, arguments, constants, grid, tile.warps, tile.stages)


def weight_launch(
    dout: Tensor,
    images: Tensor,
    listed: Tensor | None,
    visible: Tensor | None,
    shares: Tensor,
    dtype: torch.dtype,
    geometry: Geometry,
    config: EmbeddingConfig,
) -> Launch:
    """→ shares fp32 ``[shares, D, K]``, K in the order of the images' pixels."""
    count, width, pixels = shares.shape
    image_step, token_step, _ = dout.stride()
    arguments = {
        "dout_ptr": dout,
        "images_ptr": images,
        "order_ptr": shares if listed is None else listed,
        "visible_ptr": shares if visible is None else visible,
        "shares_ptr": shares,
        "dout_image": image_step,
        "dout_token": token_step,
        **geometry.arguments(),
        "width": width,
        "shares": count,
    }
    constants = {
        **geometry.constants(),
        "MASKED": listed is not None,
        "ELEMENT": ELEMENTS[dtype],
        **_tile(config.weight),
    }
    tile = config.weight
    grid = -(-width // tile.rows) * -(-pixels // tile.columns) * count
    return Launch(backward.weight_gradient, arguments, constants, grid, tile.warps, tile.stages)


def weight_sum_launch(shares: Tensor, dweight: Tensor, geometry: Geometry) -> Launch:
    """→ dweight fp32 ``[D, C, p, q]``, in the order of its memory."""
    arguments = {
        "shares_ptr": shares,
        "dweight_ptr": dweight,
        "elements": dweight.numel(),
        "shares": shares.shape[0],
    }
    constants = {
        "PIXELS": geometry.pixels,
        "CHANNELS": geometry.channels if geometry.channels_last else 1,
        "BLOCK": configs.SUM_BLOCK,
    }
    grid = -(-dweight.numel() // configs.SUM_BLOCK)
    return Launch(backward.weight_sum, arguments, constants, grid, configs.WARPS, 1)


def token_sums_launch(
    dout: Tensor,
    hidden: Tensor | None,
    dpos: Tensor | None,
    dcls: Tensor | None,
    seen: Tensor | None,
    masked: Tensor | None,
) -> Launch:
    """What is None is not wanted: dpos ``[N + 1, D]``, dcls ``[D]``, seen and masked ``[N, D]``."""
    batch, tokens, width = dout.shape
    image_step, token_step, _ = dout.stride()
    arguments = {
        "dout_ptr": dout,
        "flags_ptr": dout if hidden is None else hidden,
        "dpos_ptr": dout if dpos is None else dpos,
        "dcls_ptr": dout if dcls is None else dcls,
        "seen_ptr": dout if seen is None else seen,
        "masked_ptr": dout if masked is None else masked,
        "dout_image": image_step,
        "dout_token": token_step,
        "batch": batch,
        "patches": tokens - 1,
        "width": width,
    }
    constants = {
        "MASKED": hidden is not None,
        "DPOS": dpos is not None,
        "DCLS": dcls is not None,
        "DBIAS": seen is not None,
        "DMASK": masked is not None,
        "IMAGES": configs.IMAGES,
        "COLUMNS": configs.IMAGE_COLUMNS,
    }
    only_cls = dpos is None and seen is None and masked is None
    grid = (1 if only_cls else tokens) * -(-width // configs.IMAGE_COLUMNS)
    return Launch(backward.token_sums, arguments, constants, grid, configs.WARPS, 1)


def sum_over_tokens_launch(parts: Tensor, total: Tensor) -> Launch:
    arguments = {
        "parts_ptr": parts,
        "total_ptr": total,
        "patches": parts.shape[0],
        "width": parts.shape[1],
    }
    constants = {"ROWS": configs.TOKENS, "COLUMNS": configs.TOKEN_COLUMNS}
    grid = -(-parts.shape[1] // configs.TOKEN_COLUMNS)
    return Launch(backward.sum_over_tokens, arguments, constants, grid, configs.WARPS, 1)
