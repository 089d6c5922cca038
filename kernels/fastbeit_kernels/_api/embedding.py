"""From images to tokens: patches projected, masked ones replaced, CLS prepended."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .._checks import INTEGERS, check_tensor, embedding_unfit, rows_unfit
from .._dispatch import Impl, choose


def embed_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    *,
    positions: Tensor | None = None,
    mask_token: Tensor | None = None,
    pos_embed: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Tokens of images: CLS, then each patch's projection, or the mask token in its place.

    Args:
        images: ``[B, C, h, w]``, any memory format; h and w are multiples of the patch's sides.
        weight, bias: ``[D, C, p, q]`` and ``[D]`` or None: a convolution whose stride is its size.
        cls_token, mask_token: ``[D]``.
        positions: ``[B, M]`` integers: masked patches in raster order (of N, CLS not counted), -1
            in empty slots, in any order, repeats allowed; or None, and mask_token is not used.
        pos_embed: ``[N + 1, D]`` absolute positions, added last, or None.

    Returns:
        ``[B, N + 1, D]`` in the widest dtype of the projection (weight's, to which images are cast)
        and the tokens and positions. Under autocast the projection is in its dtype instead, and
        the others stay as they are. Gradients reach everything but images: the kernels give them
        none (``impl="auto"``: the reference does). The kernels don't project masked patches, and
        round once, at the end.
    """
    check_tensor("images", images, ("B", "C", "h", "w"))
    check_tensor("weight", weight, ("D", images.shape[1], "p", "q"), like=images)
    width, _, *patch = weight.shape
    for side, size, step in zip(("h", "w"), images.shape[2:], patch, strict=True):
        if size == 0 or size % step:
            raise ValueError(
                f"images must be a whole number of {patch[0]}x{patch[1]} patches, got {side} = "
                f"{size}; resize or pad them"
            )
    if bias is not None:
        check_tensor("bias", bias, (width,), like=images)
    check_tensor("cls_token", cls_token, (width,), like=images)
    if positions is not None:
        check_tensor("positions", positions, (images.shape[0], "M"), dtypes=INTEGERS, like=images)
        if mask_token is None:
            raise ValueError("positions name masked patches, but mask_token is None")
    if mask_token is not None:
        check_tensor("mask_token", mask_token, (width,), like=images)
    if pos_embed is not None:
        tokens = images.shape[2] // patch[0] * (images.shape[3] // patch[1]) + 1
        check_tensor("pos_embed", pos_embed, (tokens, width), like=images)
    unfit = embedding_unfit(images, weight) or rows_unfit(
        bias=bias, cls_token=cls_token, mask_token=mask_token, pos_embed=pos_embed
    )
    match choose("embed_patches", impl, images, unfit):
        case "triton":
            from .._embedding import ops

            return ops.embed_patches(
                images, weight, bias, cls_token, positions, mask_token, pos_embed
            )
        case "reference":
            return reference.embed_patches(
                images,
                weight,
                bias,
                cls_token,
                positions=positions,
                mask_token=mask_token,
                pos_embed=pos_embed,
            )
