"""The inputs of one call of an operation, what a function makes of them, and the truth.

A `Function` computes outputs, by name, from a `Call`: ours, the definition in whatever precision
the inputs have, and each peer's are such functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """Inputs of one call. ``batched``: names whose first dimension is that of the batch."""

    shape: Any
    leaves: dict[str, Tensor]
    """Those that take a gradient."""
    given: dict[str, Tensor] = field(default_factory=dict)
    """Those that take none."""
    douts: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of outputs, by the output's name; of some operations none has any."""
    batched: frozenset[str] = frozenset()

    def everything(self, change: Callable[[str, Tensor], Tensor]) -> Call:
        """Another call, each tensor replaced by ``change(name, tensor)``."""
        parts = (self.leaves, self.given, self.douts)
        leaves, given, douts = ({n: change(n, x) for n, x in part.items()} for part in parts)
        return replace(self, leaves=leaves, given=given, douts=douts)

    def to(self, dtype: torch.dtype) -> Call:
        """The same values in a higher precision."""
        return self.everything(lambda _, x: x.to(dtype) if x.is_floating_point() else x)

    def images(self, first: int, last: int) -> Call:
        """Places [first, last) of the batch."""
        return self.everything(lambda n, x: x[first:last] if n in self.batched else x)

    @property
    def size(self) -> int:
        """Of the batch; 1 where no input has one."""
        tensors = {**self.leaves, **self.given}
        return next((x.shape[0] for name, x in tensors.items() if name in self.batched), 1)

    def without(self, *names: str) -> Call:
        return replace(self, leaves={n: x for n, x in self.leaves.items() if n not in names})

    def detached(self, *names: str) -> Call:
        """The same call, the leaves of these names given instead: no gradient is asked for them."""
        moved = {n: x.detach() for n, x in self.leaves.items() if n in names}
        return replace(self.without(*names), given={**self.given, **moved})

    def recorded(self) -> Call:
        """Fresh leaves that require gradients."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.leaves.items()}
        return replace(self, leaves=leaves)

    def tensor(self, name: str) -> Tensor:
        """A leaf, or what is given by that name."""
        return self.leaves[name] if name in self.leaves else self.given[name]

    def optional(self, name: str) -> Tensor | None:
        return self.leaves.get(name, self.given.get(name))

    def bytes(self) -> int:
        tensors = [*self.leaves.values(), *self.given.values(), *self.douts.values()]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


Function = Callable[[Call], Outputs]


def gradients(outputs: Outputs, call: Call, *, keep: bool = False) -> Outputs:
    """Of every leaf, named ``d<leaf>``; nothing where no output has a gradient."""
    if not call.douts:
        return {}
    names = list(call.douts)
    found = torch.autograd.grad(
        [outputs[name] for name in names],
        list(call.leaves.values()),
        [call.douts[name].to(outputs[name].dtype) for name in names],
        retain_graph=keep,
    )
    return {f"d{name}": gradient for name, gradient in zip(call.leaves, found, strict=True)}


def results(function: Function, call: Call) -> Outputs:
    """The outputs, and the gradient of every leaf, by name."""
    call = call.recorded() if call.douts else call
    outputs = function(call)
    found = gradients(outputs, call)
    return {**{name: tensor.detach() for name, tensor in outputs.items()}, **found}


def define_in_float64(definition: Function, call: Call) -> Outputs:
    return results(definition, call.to(torch.float64))


def define_in_parts(definition: Function, call: Call, step: int) -> Outputs:
    """The same, ``step`` places of the batch at a time; gradients of what they share are summed."""
    call, size = call.to(torch.float64), call.size
    if not call.batched or step >= size:
        return results(definition, call)
    parts = [
        results(definition, call.images(first, min(first + step, size)))
        for first in range(0, size, step)
    ]
    shared = {f"d{name}" for name in call.leaves if name not in call.batched}
    return {
        name: torch.stack([part[name] for part in parts]).sum(0)
        if name in shared
        else torch.cat([part[name] for part in parts])
        for name in parts[0]
    }
