"""The operations of a ViT's pre-training step, each as a public function.

Attention with a trained bias, residual + LayerScale + LayerNorm, bias + GELU, the masked loss of a
linear head, the argmax of one, the embedding of patches, the convolutions of a frozen tokenizer.
They need torch alone, know nothing of fastbeit, and serve any ViT. ``reference.py`` is their
specification in plain PyTorch. ``impl="triton"`` takes a Triton kernel (an NVIDIA GPU of compute
capability 8.0 or newer; on a CPU TRITON_INTERPRET=1) or fails, and never silently falls back;
``impl="reference"`` takes the reference; ``impl="auto"`` the better of the two, which is the
reference until the operation's kernels have been shown right and faster on a GPU
(``SHOWN_ON_A_GPU``); ``choose`` tells which one a call takes, ``why_not`` why a device has none.
Wrong shapes, dtypes and devices raise ValueError.
Importing this package queries no GPU and imports no Triton.

Shapes: B batch, T tokens, Tq queries, Tk keys, N patches, H heads, d head width, D width, M slots,
V classes. Positions index rows of what they are given (tokens, CLS included; patches where images
are given); -1 marks an empty slot, whose row comes back zero and takes no gradient.
"""

from __future__ import annotations

from ._api.attention import (
    attention,
    attention_packed,
    expand_rel_pos_bias,
    rel_pos_attention,
    rel_pos_attention_packed,
)
from ._api.convolution import conv2d_channels_last, conv2d_pointwise_channels_last
from ._api.embedding import embed_patches
from ._api.gelu import bias_gelu
from ._api.head import linear_argmax, masked_linear_cross_entropy
from ._api.layer_norm import scale_residual, scale_residual_layer_norm
from ._dispatch import SHOWN_ON_A_GPU, Impl, choose, not_shown, why_not
from .reference import MimLoss

__all__ = [
    "SHOWN_ON_A_GPU",
    "Impl",
    "MimLoss",
    "attention",
    "attention_packed",
    "bias_gelu",
    "choose",
    "conv2d_channels_last",
    "conv2d_pointwise_channels_last",
    "embed_patches",
    "expand_rel_pos_bias",
    "linear_argmax",
    "masked_linear_cross_entropy",
    "not_shown",
    "rel_pos_attention",
    "rel_pos_attention_packed",
    "scale_residual",
    "scale_residual_layer_norm",
    "why_not",
]
