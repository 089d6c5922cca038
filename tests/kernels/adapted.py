"""What the adapters' tests share: an untouched model, its copy with the kernels, and float64.

The tolerance is the kernels' rule: an output's or gradient's distance from the untouched model in
float64 is at most twice that of the untouched model in the working precision, with room for four
roundings of its norm (or of the median gradient's, where the exact one is zero, as that of a bias
of the keys is).
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

Call = Callable[[nn.Module, Tensor], Tensor]


def randomise(model: nn.Module, seed: int = 5) -> nn.Module:
    """Every parameter drawn, so that none's gradient can be missing unseen; norms about one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def images(height: int, width: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(9))


@contextlib.contextmanager
def drawn_in_float32():
    """torch.rand draws other numbers in float64; a float64 run is to drop the same paths."""
    rand = torch.rand

    def drawn(*shape, dtype=None, **arguments):
        return rand(*shape, dtype=torch.float32, **arguments).to(dtype)

    torch.rand = drawn
    try:
        yield
    finally:
        torch.rand = rand


def results(model: nn.Module, pixels: Tensor, call: Call) -> dict[str, Tensor]:
    """Output and every parameter's gradient, of a loss that weighs all of the output."""
    dtype = next(model.parameters()).dtype
    torch.manual_seed(3)  # what DropPath draws from
    with drawn_in_float32() if dtype == torch.float64 else contextlib.nullcontext():
        output = call(model, pixels.to(dtype))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (output * weights.to(output.dtype)).sum().backward()
    found = {"output": output.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.clone()
    return found


def distance(ours: Tensor, exact: Tensor) -> float:
    return (ours.double() - exact.double()).norm().item()


def check_agreement(
    untouched: nn.Module,
    fast: nn.Module,
    pixels: Tensor,
    call: Call,
    working: torch.dtype = torch.float32,
) -> None:
    plain = results(untouched, pixels, call)
    ours = results(fast, pixels, call)
    with torch.autocast("cpu", enabled=False):
        exact = results(copy.deepcopy(untouched).double(), pixels, call)
    assert list(ours) == list(plain)
    norms = {name: value.norm().item() for name, value in exact.items()}
    median = statistics.median(norms.values())
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype, name
        room = 4 * torch.finfo(working).eps * max(norms[name], median)
        bound = 2 * distance(plain[name], exact[name]) + room
        assert distance(value, exact[name]) <= bound, (name, bound)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def applied(apply: Callable, model: nn.Module, impl: str = "reference") -> nn.Module:
    """A copy with the kernels in everything that looks like it has a use for them."""
    fast = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = apply(fast, impl=impl)
    assert report.skipped == {}
    return fast
