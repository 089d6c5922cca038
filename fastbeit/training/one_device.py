"""Mixed precision on one device: fp32 master weights, arithmetic on copies in the student's dtype.

What FSDP2 does at one rank, to the bit (a test compares them), without its two passes over every
weight and four over every gradient, and on one stream with nothing kept from step to step, so that
a step can be captured in a CUDA graph. In fp32 the masters themselves are computed with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class _Copies(torch.autograd.Function):
    """All weights in another dtype, and their gradients back in fp32, a few launches each way."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a weight without a gradient stays so
        copies = [torch.empty_like(master, dtype=dtype) for master in masters]
        torch._foreach_copy_(copies, masters)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        exact = [None if g is None else torch.empty_like(g, dtype=torch.float32) for g in grads]
        pairs = [(e, g) for e, g in zip(exact, grads, strict=True) if e is not None]
        if pairs:
            into, given = zip(*pairs, strict=True)
            torch._foreach_copy_(into, given)
        return None, *exact


class WorkingWeights:
    """Puts copies of a model's weights in their place for a forward and backward pass.

    Args:
        model: with fp32 parameters, which stay the optimizer's and the checkpoint's.
        dtype: of the copies.
        exact: modules whose parameters are used in fp32 as they are.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, exact: tuple[nn.Module, ...] = ()
    ) -> None:
        kept = {id(p) for module in exact for p in module.parameters()}
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        masters: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype == dtype or id(parameter) in kept:
                    continue
                places.setdefault(id(parameter), []).append((module, name))
                masters[id(parameter)] = parameter
        self._dtype = dtype
        self._masters = list(masters.values())
        self._places = list(places.values())

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """The copies are the model's parameters inside; gradients reach the masters."""
        if not self._masters:
            yield
            return
        copies: tuple[Tensor, ...] = _Copies.apply(  # pyright: ignore[reportAssignmentType]
            self._dtype, *self._masters
        )
        try:
            self._put(copies)
            yield
        finally:
            self._put(self._masters)

    def _put(self, weights: tuple[Tensor, ...] | list[nn.Parameter]) -> None:
        for places, weight in zip(self._places, weights, strict=True):
            for module, name in places:
                module._parameters[name] = weight  # pyright: ignore[reportArgumentType]
