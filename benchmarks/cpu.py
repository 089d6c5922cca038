"""What the suites for a CPU share: a twin is compared with float64, then timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.call import Function, results
from benchmarks.operation import Operation, Pass
from benchmarks.suite import DEVICE, measure, missing, name_row

Twins = Mapping[str, Callable[[Any], Function]]
TOLERANCE = 1e-5


def run(
    benchmark: Any,
    operation: Operation,
    shape: Any,
    form: str,
    twins: Twins,
    direction: Pass = "forward",
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> None:
    """Time a form ``"forward"``, with nothing recorded, or ``"both"``; rates are by the least
    work. ``sizes``: what tells a shape from another that is described alike."""
    part = f"{operation.name}, {direction}"
    about: dict[str, Any] = {"suite": "kernels", "part": part, "path": form}
    sizes["shape"] = shape.describe()
    name_row(benchmark, about, sizes)
    if DEVICE != "cpu":
        missing("on a GPU they are timed by python -m benchmarks.gpu")
    call = shape.make(dtype, 0, torch.device("cpu"))
    function = twins[form](shape)

    def check() -> None:
        truth = operation.truth(operation.definition, call)
        for name, found in results(function, call).items():
            if name in truth and found.is_floating_point():
                error = (found - truth[name]).norm() / truth[name].norm()
                assert error <= TOLERANCE, f"{name} is {error:.1e} off"
            elif name in truth:
                share = (found != truth[name]).double().mean()
                assert share <= 1e-3, f"{name} differs in {100 * share:.1f} %"

    @torch.no_grad()
    def forward() -> object:
        return function(call)

    measure(
        benchmark,
        forward if direction == "forward" else lambda: results(function, call),
        **about,
        check=check,
        images=getattr(shape, "batch", 0),
        work=shape.work(direction, dtype),
        dtype=str(dtype).removeprefix("torch."),
        **sizes,
    )
