"""Launches of bias + GELU in the MLPs of training's shapes, the bias in fp32.

Counted FLOPs an element: forward 12 (sum 1, the normal distribution 10 as a polynomial of degree 7
and its power of two would have it, product 1), backward 20 (also the density 4, the gradient 3, the
sum of dbias 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._gelu import arguments
from .._launch import Launch
from .record import Record, meta, round_up

FORWARD, BACKWARD = 12, 20
# B images of T tokens, four times as wide as the residual stream; 75 of the tokens in the last
# block, whose others nothing reads.
SHAPES = (
    ("BEiT-B", 128 * 197, 3072),
    ("BEiT-B, last block", 128 * 75, 3072),
    ("BEiT-L", 64 * 197, 4096),
    ("BEiT-L, last block", 64 * 75, 4096),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gelu_records(
    family: str, model: str, rows: int, width: int, dtype: torch.dtype
) -> Iterator[Record]:
    """Forward, backward with dbias, and the sum of its shares."""
    x, out, dout, dx = (meta(rows, width, dtype=dtype) for _ in range(4))
    bias, dbias = (meta(width, dtype=torch.float32) for _ in range(2))
    config = arguments.config_of(x, family)
    shares = meta(arguments.stretches(x, config), width, dtype=torch.float32)
    element = str(dtype).removeprefix("torch.")
    name = f"{model}, {rows}x{width}"

    def record(kernel: str, element: str, launch: Launch, flops: int, *tensors: Tensor) -> Record:
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        lanes = round_up(width, launch.constants["COLUMNS"])
        padded = flops * lanes // width
        return Record(f"{kernel}: {name}", element, launch, flops, padded, moved, moved)

    launch = arguments.forward_launch(x, bias, out, config)
    yield record("bias, GELU forward", element, launch, FORWARD * x.numel(), x, out, bias)
    launch = arguments.backward_launch(dout, x, bias, dx, shares, config)
    tensors = (dout, x, dx, bias, shares)
    yield record("bias, GELU backward", element, launch, BACKWARD * x.numel(), *tensors)
    launch = arguments.sum_launch(shares, dbias)
    yield record("sum of GELU's dbias", "float32", launch, shares.numel(), shares, dbias)


def records(family: str) -> Iterator[Record]:
    for dtype in DTYPES:
        for model, rows, width in SHAPES:
            yield from gelu_records(family, model, rows, width, dtype)
