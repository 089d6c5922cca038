"""Launches of residual and LayerNorm in training's shapes, parameters in fp32.

Counted FLOPs an element: forward 3 for the residual (gamma, drop, sum) and 7 for the norm (mean 1,
distance 1, variance 2, rstd, weight and bias 1 each); backward 17 for the norm (n 2, g 1, its two
means 3, distance 4, dx 1 and rstd 1, dweight 2, dbias 1, dy 1, and one more for a row's numbers)
and 5 for the residual (drop 1, gamma 1, dgamma 2, dbranch's rounding 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._launch import Launch
from .._layer_norm import arguments
from .record import Record, meta

RESIDUAL, NORM = 3, 7
RESIDUAL_GRADIENT, NORM_GRADIENT = 5, 17


@dataclass(frozen=True)
class Shape:
    """B images of T tokens, D wide."""

    model: str
    batch: int
    tokens: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.batch * self.tokens}x{self.width}"


BASE, LARGE = Shape("BEiT-B", 128, 197, 768), Shape("BEiT-L", 64, 197, 1024)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _record(
    name: str,
    dtype: torch.dtype,
    launch: Launch,
    flops: int,
    rows: tuple[Tensor | None, ...],
    vectors: tuple[Tensor | None, ...],
) -> Record:
    """Rows pass once; every program reads the vectors, which come from memory once."""
    constants = launch.constants
    lanes = constants["COLUMNS"] * constants["PIECES"] if "PIECES" in constants else 0
    computed = flops * lanes // constants["WIDTH"]
    once = _bytes(*rows)
    element = str(dtype).removeprefix("torch.")
    own = _bytes(*vectors)
    return Record(name, element, launch, flops, computed, once + own, once + launch.grid * own)


def layer_norm_records(
    family: str, shape: Shape, dtype: torch.dtype, *, residual: bool, norm: bool
) -> Iterator[Record]:
    """Forward, backward with every gradient, and the sum of the parameters' gradients."""
    batch, tokens, width = shape.batch, shape.tokens, shape.width

    def rows(wanted: bool) -> Tensor | None:
        return meta(batch, tokens, width, dtype=dtype) if wanted else None

    def numbers(wanted: bool, *sizes: int) -> Tensor | None:
        return meta(*sizes, dtype=torch.float32) if wanted else None

    x, branch = meta(batch, tokens, width, dtype=dtype), rows(residual)
    gamma, weight, bias = (numbers(wanted, width) for wanted in (residual, norm, norm))
    # One column of the [B, 2 * depth] factors of all blocks.
    factors = numbers(residual, batch, 24)
    drop_scale = None if factors is None else factors[:, 0]
    y, normed = rows(residual), rows(norm)
    mean, rstd = (numbers(norm, batch, tokens) for _ in range(2))
    config = arguments.config_of(x, family)
    kind = "residual, norm" if residual and norm else "residual" if residual else "norm"
    yield _record(
        f"{kind} forward: {shape.name}",
        dtype,
        arguments.forward_launch(
            x, branch, weight, bias, 1e-6, gamma, drop_scale, y, normed, mean, rstd, config
        ),
        x.numel() * (RESIDUAL * residual + NORM * norm),
        (x, branch, y, normed, mean, rstd),
        (gamma, weight, bias),
    )

    dy, dnormed, dx, dbranch = rows(residual), rows(norm), rows(norm), rows(residual)
    kept = (y if residual else x) if norm else None
    dgamma, dweight, dbias = (numbers(wanted, width) for wanted in (residual, norm, norm))
    tile = arguments.backward_tile(config, dy, dnormed, kept, branch, dx, dbranch)
    wanted = residual + 2 * norm
    partials = meta(*arguments.partials_shape(config, tile, x, wanted), dtype=torch.float32)
    yield _record(
        f"{kind} backward: {shape.name}",
        dtype,
        arguments.backward_launch(
            dy, dnormed, kept, mean, rstd, weight, branch, gamma, drop_scale,
            dx, dbranch, dgamma, dweight, dbias, partials, config,
        ),
        x.numel() * (RESIDUAL_GRADIENT * residual + NORM_GRADIENT * norm),
        (dy, dnormed, kept, mean, rstd, branch, dx, dbranch, partials),
        (gamma, weight),
    )  # fmt: skip
    yield _record(
        f"{kind} sum of parameters' gradients: {shape.name}",
        torch.float32,
        arguments.sum_launch(partials, dgamma, dweight, dbias),
        partials.numel(),
        (partials, dgamma, dweight, dbias),
        (),
    )


def records(family: str) -> Iterator[Record]:
    """Residual and norm as nearly everywhere, the first norm, a residual that no norm follows."""
    for dtype in DTYPES:
        for shape in (BASE, LARGE):
            yield from layer_norm_records(family, shape, dtype, residual=True, norm=True)
            yield from layer_norm_records(family, shape, dtype, residual=False, norm=True)
        yield from layer_norm_records(family, BASE, dtype, residual=True, norm=False)
