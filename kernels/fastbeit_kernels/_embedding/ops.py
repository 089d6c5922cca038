"""The registered operators of ``embed_patches``.

Three: the list of tokens (``embed_order``), the tokens, and the gradients. The gradients come in
fp32 and are rounded once, to each parameter's dtype, outside; one that nobody asked for is empty.

Shapes: B images, N patches, M slots, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch import on_device
from .._operators import NAMESPACE, refuse_second_derivative
from . import arguments
from .geometry import geometry_of, readable_weight


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::embed_order", mutates_args=())
def embed_order(positions: Tensor, patches: int) -> tuple[Tensor, Tensor, Tensor]:
    """positions int32 ``[B, M]`` → hidden ``[B, N]``, listed ``[B * (N + 1)]``, visible ``[1]``."""
    positions = positions.contiguous()
    hidden, listed, visible = _empty_order(positions, patches)
    assert listed.numel() < 2**31, "tokens are numbered in int32"
    count = torch.empty(positions.shape[0], dtype=torch.int32, device=positions.device)
    with on_device(positions):
        arguments.mark_launch(positions, hidden, count).run()
        arguments.order_launch(hidden, count, listed, visible).run()
    return hidden, listed, visible


@embed_order.register_fake
def _(positions: Tensor, patches: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_order(positions, patches)


def _empty_order(positions: Tensor, patches: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, device = positions.shape[0], positions.device
    hidden = torch.empty(batch, patches, dtype=torch.int32, device=device)
    listed = torch.empty(batch * (patches + 1), dtype=torch.int32, device=device)
    return hidden, listed, torch.empty(1, dtype=torch.int32, device=device)


@torch.library.custom_op(f"{NAMESPACE}::embed_forward", mutates_args=())
def embed_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    mask_token: Tensor | None,
    pos_embed: Tensor | None,
    hidden: Tensor | None,
    listed: Tensor | None,
    visible: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``dtype`` is the projection's; ``hidden`` is for the gradients."""
    geometry = geometry_of(images, *weight.shape[2:])
    out = _empty_tokens(images, weight, cls_token, mask_token, pos_embed, dtype)
    read = readable_weight(weight, geometry, dtype)
    bias, mask_token, pos_embed = (
        None if tensor is None else tensor.contiguous() for tensor in (bias, mask_token, pos_embed)
    )
    config = arguments.config_of(images.device, dtype)
    with on_device(images):
        arguments.forward_launch(
            images, read, bias, cls_token.contiguous(), mask_token, pos_embed, listed, visible,
            out, geometry, config,
        ).run()  # fmt: skip
    return out


@embed_forward.register_fake
def _(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    mask_token: Tensor | None,
    pos_embed: Tensor | None,
    hidden: Tensor | None,
    listed: Tensor | None,
    visible: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return _empty_tokens(images, weight, cls_token, mask_token, pos_embed, dtype)


def _empty_tokens(
    images: Tensor,
    weight: Tensor,
    cls_token: Tensor,
    mask_token: Tensor | None,
    pos_embed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``[B, N + 1, D]`` in the widest dtype of the projection, tokens and positions."""
    for tensor in (cls_token, mask_token, pos_embed):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    width, _, lines, patch_width = weight.shape
    patches = images.shape[2] // lines * (images.shape[3] // patch_width)
    return images.new_empty(images.shape[0], patches + 1, width, dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::embed_backward", mutates_args=())
def embed_backward(
    dout: Tensor,
    images: Tensor,
    hidden: Tensor | None,
    listed: Tensor | None,
    visible: Tensor | None,
    lines: int,
    patch_width: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dW ``[D, C, p, q]``, dbias, dcls, dmask ``[D]``, dpos ``[N + 1, D]``, those ``wanted``."""
    dout = _rows_contiguous(dout)
    gradients = _empty_gradients(dout, images, lines, patch_width, wanted)
    dweight, dbias, dcls, dmask, dpos = gradients
    geometry = geometry_of(images, lines, patch_width)
    width = dout.shape[2]

    def fresh(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=dout.device)

    with on_device(dout):
        if wanted[0]:
            config = arguments.config_of(dout.device, dtype)
            count = arguments.shares_for(config, width, geometry)
            shares = fresh(count, width, geometry.pixels)
            arguments.weight_launch(
                dout, images, listed, visible, shares, dtype, geometry, config
            ).run()
            arguments.weight_sum_launch(shares, dweight, geometry).run()
        if any(wanted[1:]):
            seen = fresh(geometry.patches, width) if wanted[1] else None
            masked = fresh(geometry.patches, width) if wanted[3] else None
            arguments.token_sums_launch(
                dout,
                hidden,
                dpos if wanted[4] else None,
                dcls if wanted[2] else None,
                seen,
                masked,
            ).run()
            for parts, total in ((seen, dbias), (masked, dmask)):
                if parts is not None:
                    arguments.sum_over_tokens_launch(parts, total).run()
    return gradients


@embed_backward.register_fake
def _(
    dout: Tensor,
    images: Tensor,
    hidden: Tensor | None,
    listed: Tensor | None,
    visible: Tensor | None,
    lines: int,
    patch_width: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(dout, images, lines, patch_width, wanted)


def _empty_gradients(
    dout: Tensor, images: Tensor, lines: int, patch_width: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, tokens, width = dout.shape
    weight = (width, images.shape[1], lines, patch_width)
    shapes = (weight, (width,), (width,), (width,), (tokens, width))
    dweight, dbias, dcls, dmask, dpos = (
        torch.empty(shape if wants else (0,), dtype=torch.float32, device=dout.device)
        for shape, wants in zip(shapes, wanted, strict=True)
    )
    return dweight, dbias, dcls, dmask, dpos


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, *parameters, hidden, listed, visible, ctx.dtype = inputs
    ctx.save_for_backward(images, hidden, listed, visible)
    ctx.patch = weight.shape[2:]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, *parameters)]


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    images, hidden, listed, visible = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[1:6])
    found = embed_backward(dout, images, hidden, listed, visible, *ctx.patch, ctx.dtype, wanted)
    rounded = [
        gradient.to(dtype) if wants else None
        for gradient, dtype, wants in zip(found, ctx.dtypes, wanted, strict=True)
    ]
    return None, *rounded, None, None, None, None


embed_forward.register_autograd(_gradients, setup_context=_save)


refuse_second_derivative("embed_patches", embed_backward)


def embed_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    positions: Tensor | None,
    mask_token: Tensor | None,
    pos_embed: Tensor | None,
) -> Tensor:
    """The public function of that name, on Triton; arguments are checked.

    Under autocast the projection is computed in its dtype, as a convolution is; tokens and
    positions stay as they are, and the result is as wide as they.
    """
    device = images.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    hidden = listed = visible = None
    if positions is None:
        mask_token = None
    else:
        patches = images.shape[2] // weight.shape[2] * (images.shape[3] // weight.shape[3])
        hidden, listed, visible = embed_order(positions.to(torch.int32), patches)
    return embed_forward(
        images, weight, bias, cls_token, mask_token, pos_embed, hidden, listed, visible, dtype
    )
