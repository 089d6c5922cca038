"""Every operation of ``fastbeit_kernels`` in plain PyTorch: the specification, read in one sitting.

Shapes: B batch, T tokens, Tq queries, Tk keys, H heads, d head width, D width, M slots, V classes,
R rows. Autograd gives every gradient, the bias's included. A slot of -1 names nothing: its row of
the result is zero and no gradient passes through it. Shapes are static; nothing waits for the
device. Each function has the signature of the public one in ``__init__.py`` without ``impl``;
arguments are checked there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MimLoss(NamedTuple):
    """``loss`` fp32, ``correct`` int64 and ``count`` int64, each a scalar tensor on the device."""

    loss: Tensor
    correct: Tensor
    count: Tensor


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * Q Kᵀ + bias) V on ``[B, H, T, d]``: the definition.

    The scores leave the product in the inputs' precision; the bias is added, and the softmax taken,
    in fp32.
    """
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if q.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if bias is not None:
        scores = scores + bias
    return torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)


def _rows_padded_to_8(bias: Tensor) -> Tensor:
    """The same values with memory rows a multiple of 8 long, as memory-efficient attention asks."""
    columns = bias.shape[-1]
    return F.pad(bias, (0, -columns % 8))[..., :columns]


def _scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """:func:`softmax_attention` by the quickest of PyTorch's own ways.

    On a CPU the fused kernel gives no gradient to a bias, and PyTorch's fall-back is slower than
    the definition (8 images, 197 tokens, 12 heads, one core: 27 against 21 ms forward, the same
    backward); in bf16 its own backward is 2.5 times slower. Elsewhere it wins (12 against 17 ms).
    """
    learning = torch.is_grad_enabled()
    if q.device.type == "cpu":
        half = q.dtype in (torch.float16, torch.bfloat16)
        wants_bias_gradient = bias is not None and bias.requires_grad
        wants_gradient = q.requires_grad or k.requires_grad or v.requires_grad
        if learning and (wants_bias_gradient or (half and wants_gradient)):
            return softmax_attention(q, k, v, bias, scale)
    if bias is not None:
        # The fused kernels hold a bias of the inputs' dtype and add it to fp32 scores.
        bias = bias.to(q.dtype)
        if q.device.type != "cpu":
            bias = _rows_padded_to_8(bias)
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _bias_of_queries(bias_HTK: Tensor, query_positions_BQ: Tensor) -> Tensor:
    """Rows ``query_positions`` of ``[H, T, Tk]`` as ``[B, H, Tq, Tk]``; -1 takes row 0, unused.

    As an embedding, because its backward sums repeated rows in a fixed order on every device.
    """
    heads, rows, columns = bias_HTK.shape
    padded = F.pad(bias_HTK, (0, -columns % 8))
    flat = padded.transpose(0, 1).reshape(rows, -1)
    picked = F.embedding(query_positions_BQ.clamp(min=0).long(), flat)
    return picked.unflatten(-1, (heads, -1)).transpose(1, 2)[..., :columns]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    query_positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    filled = None
    if query_positions is not None:
        filled = (query_positions >= 0)[:, :, None, None]
        q = torch.where(filled, q, 0)
        if bias is not None:
            bias = _bias_of_queries(bias, query_positions)
    elif bias is not None and bias.dim() < 4:
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = _scaled_dot_product(q, k, v, bias, factor).transpose(1, 2)
    return out if filled is None else torch.where(filled, out, 0)


def attention_packed(
    qkv: Tensor, bias: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, bias, scale=scale)


def expand_rel_pos_bias(
    table: Tensor, index: Tensor, *, grid: tuple[int, int] | None = None
) -> Tensor:
    """Its backward is an embedding's: one reduction to the table, in a fixed order.

    ``grid`` is a hint for kernels that use the index's structure; the values don't depend on it.
    """
    tokens, heads = index.shape[0], table.shape[1]
    row = tokens + -tokens % 8
    # Not a padded tensor's slice: sharding warns of modules that return a view.
    bias_HTT = torch.empty_strided(
        (heads, tokens, tokens), (tokens * row, row, 1), dtype=torch.float32, device=table.device
    )
    return bias_HTT.copy_(F.embedding(index.long(), table.float()).permute(2, 0, 1))


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    index: Tensor,
    *,
    query_positions: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    scale: float | None = None,
) -> Tensor:
    bias = expand_rel_pos_bias(table, index, grid=grid)
    return attention(q, k, v, bias, query_positions=query_positions, scale=scale)


def rel_pos_attention_packed(
    qkv: Tensor,
    table: Tensor,
    index: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    scale: float | None = None,
) -> Tensor:
    return attention_packed(qkv, expand_rel_pos_bias(table, index, grid=grid), scale=scale)


def scale_residual_layer_norm(
    x: Tensor,
    branch: Tensor | None = None,
    *,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-6,
    gamma: Tensor | None = None,
    drop_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x + drop_scale * gamma * branch, added in the wider of the dtypes and stored in x's."""
    y = x
    if branch is not None:
        y = scale_residual(x, branch, gamma=gamma, drop_scale=drop_scale)
    normed = F.layer_norm(y, (y.shape[-1],), weight.to(y.dtype), _to(bias, y.dtype), eps)
    return y, normed.to(y.dtype)


def scale_residual(
    x: Tensor, branch: Tensor, *, gamma: Tensor | None = None, drop_scale: Tensor | None = None
) -> Tensor:
    """The first half of :func:`scale_residual_layer_norm`, where no norm follows."""
    factor = None if drop_scale is None else drop_scale[:, None, None]
    if gamma is not None:
        factor = gamma if factor is None else gamma * factor
    y = x + branch if factor is None else torch.addcmul(x, branch, factor)
    return y.to(x.dtype)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU(x + bias) by erf, added in the wider of the dtypes and stored in x's."""
    return F.gelu(x if bias is None else x + bias).to(x.dtype)


def masked_linear_cross_entropy(
    hidden: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> MimLoss:
    """Mean of -log softmax(hidden Wᵀ + b)[target] over the filled slots; 0 where there are none.

    Logits leave the product in the inputs' precision; the loss is fp32. ``correct`` counts the
    targets that are the argmax (the lowest index among equals).
    """
    filled = targets >= 0
    if positions is not None:
        filled = filled & (positions >= 0)
        rows = positions.clamp(min=0).long()[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, rows)
    # Empty slots may hold anything, NaN too; zeros keep it out of the weight's gradient.
    hidden = torch.where(filled[..., None], hidden, 0)
    safe_targets = torch.where(filled, targets, -1)
    logits = F.linear(hidden, weight, bias).float().flatten(0, 1)
    count = filled.sum()
    total = F.cross_entropy(
        logits,
        safe_targets.flatten(),
        ignore_index=-1,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    correct = (logits.detach().argmax(-1) == safe_targets.flatten()).sum()
    return MimLoss(total / count.clamp(min=1), correct, count)


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """argmax over V of x Wᵀ + b, compared in fp32; ties go to the lowest index.

    Scores rounded to 16 bits would tie by the dozen among 8192 classes, so half precision inputs
    are multiplied into fp32.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16):
            scores = torch.mm(x, weight.t().to(x.dtype), out_dtype=torch.float32)
        else:
            scores = torch.mm(x.float(), weight.float().t())
        if bias is not None:
            scores = scores + bias.float()
        return scores.argmax(-1)


def embed_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    *,
    positions: Tensor | None = None,
    mask_token: Tensor | None = None,
    pos_embed: Tensor | None = None,
) -> Tensor:
    """A convolution whose stride is its size; masked patches replaced; CLS in front."""
    projected = F.conv2d(
        images.to(weight.dtype), weight, _to(bias, weight.dtype), stride=weight.shape[2:]
    )
    patches_BND = projected.flatten(2).transpose(1, 2)
    batch, count, width = patches_BND.shape
    if positions is not None and mask_token is not None:
        # Column 0 stands for CLS and collects the empty slots; no patch is touched by them.
        masked_BT = torch.zeros(batch, count + 1, dtype=torch.bool, device=images.device)
        masked_BT = masked_BT.scatter(1, positions.long() + 1, True)
        patches_BND = torch.where(masked_BT[:, 1:, None], mask_token, patches_BND)
    tokens_BTD = torch.cat((cls_token.expand(batch, 1, width), patches_BND), dim=1)
    return tokens_BTD if pos_embed is None else tokens_BTD + pos_embed


def conv2d_channels_last(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gain: float = 1.0,
    relu_input: bool = False,
    relu_output: bool = False,
) -> Tensor:
    """In place where nobody else holds the tensor."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(F.relu(x) if relu_input else x, weight, bias, padding=weight.shape[-1] // 2)
        if residual is None:
            y = y if gain == 1.0 else y.mul_(gain)
        else:
            y = y.add_(residual) if gain == 1.0 else torch.add(residual, y, alpha=gain)
        y = y.relu_() if relu_output else y
        return y.contiguous(memory_format=torch.channels_last)


def conv2d_pointwise_channels_last(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    gain: float = 1.0,
    relu_output: bool = False,
) -> Tensor:
    hidden = conv2d_channels_last(x, weight, bias, relu_output=True)
    return conv2d_channels_last(
        hidden,
        pointwise_weight,
        pointwise_bias,
        residual=residual,
        gain=gain,
        relu_output=relu_output,
    )
