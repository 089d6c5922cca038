"""The encoder as it runs for pre-training: frozen, channels-last, little said twice to memory.

A block is three calls: ReLU + conv_1 + ReLU, conv_2 + ReLU, and conv_3 + ReLU + conv_4 with the
residual branch's gain and the skip added. By PyTorch the values are bit for bit those of
``Encoder.features``, in every dtype: the same operations in the same order, ReLUs and sums done in
place where the tensor is nobody else's. By ``fastbeit_kernels`` each call is one Triton kernel and
rounds less often. The weights stay the encoder's own: cast once, in channels-last memory, which is
the layout the kernels read. The gain is multiplied in fp32 as the skip is added, and not folded
into the weights: a power of two folds exactly in bf16 and fp32, but in fp16 a weight below 2**-8
times 1/64 falls among the subnormal numbers, and other gains don't fold exactly at all.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbeit.tokenizer.dvae import Block, Conv, Encoder
from fastbeit_kernels import Impl, conv2d_channels_last, conv2d_pointwise_channels_last

KERNEL_HIDDEN = (16, 128)
"""Hidden channels, from and to, of the blocks that go to the Triton kernels under impl="triton".

Of the published encoder these are the groups at 112 x 112 (64 hidden channels) and 56 x 56 (128)
pixels, where what PyTorch does between convolutions weighs most. Counted for 128 images in bf16 on
an H100, in ms: the kernels at the floor that the compile report gives them, L2 included, against
each convolution at its arithmetic or memory limit and separate ReLUs and sums at memory's:
3.5 : 6.0 for the first group, 2.8 : 3.7, and for the others 2.8 : 2.6 and 2.7 : 2.2. So those, and
the first convolution with its three channels, stay with cuDNN. Floors, not measurements.
"""


def kernels_take(block: Block) -> bool:
    """Whether impl="triton" runs this block on the kernels, by the frozen table."""
    hidden = cast(Conv, block.res_path["conv_1"]).w.shape[0]
    return KERNEL_HIDDEN[0] <= hidden <= KERNEL_HIDDEN[1]


def chosen(encoder: Encoder, impl: Impl) -> dict[str, str]:
    """What runs the encoder and its head, in words, for ``Tokenizer.describe``."""
    match impl:
        case "reference":
            how = "PyTorch"
        case "auto":
            how = "Triton for operations shown right and faster on a GPU, PyTorch for the others"
        case "triton":
            blocks = [
                name.removeprefix("blocks.")
                for name, module in encoder.named_modules()
                if isinstance(module, Block) and kernels_take(module)
            ]
            how = f"Triton for the head and {', '.join(blocks) or 'no block'}, PyTorch for the rest"
    return {"impl": impl, "runs": how}


def features(encoder: Encoder, images_BCHW: Tensor, impl: Impl = "auto") -> Tensor:
    """``encoder.features`` without a gradient: what the head reads, after its ReLU, [B, D, h, w].

    Args:
        images_BCHW: mapped pixels in the weights' dtype, channels-last.
        impl: of the kernels; "triton" takes them for the blocks of ``kernels_take``.
    """
    with torch.no_grad(), torch.autocast(images_BCHW.device.type, enabled=False):
        x = _conv(cast(Conv, encoder.blocks["input"]), images_BCHW)
        for number in range(1, len(encoder.config.widths) + 1):
            if number > 1:
                x = F.max_pool2d(x, 2)
            for block in cast(nn.ModuleDict, encoder.blocks[f"group_{number}"]).values():
                x = _block(cast(Block, block), x, impl)
        return x.relu_()


def _conv(conv: Conv, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.w, conv.b, padding=conv.w.shape[-1] // 2)


def _block(block: Block, x: Tensor, impl: Impl) -> Tensor:
    if impl == "triton" and not kernels_take(block):
        impl = "reference"
    conv_1, conv_2, conv_3, conv_4 = cast(list[Conv], list(block.res_path.values()))
    hidden = conv2d_channels_last(
        x, conv_1.w, conv_1.b, relu_input=True, relu_output=True, impl=impl
    )
    hidden = conv2d_channels_last(hidden, conv_2.w, conv_2.b, relu_output=True, impl=impl)
    skip = block.id_path
    return conv2d_pointwise_channels_last(
        hidden,
        conv_3.w,
        conv_3.b,
        conv_4.w,
        conv_4.b,
        residual=x if skip is None else conv2d_channels_last(x, skip.w, skip.b, impl=impl),
        gain=block.gain,
        impl=impl,
    )
