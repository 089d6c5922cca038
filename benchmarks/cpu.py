"""What the suites for a CPU share: a twin is compared with float64, then timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.call import Function, results
from benchmarks.operation import Operation, Pass

Twins = Mapping[str, Callable[[Any], Function]]
TOLERANCE = 1e-5


def run(
    benchmark: Any,
    operation: Operation,
    shape: Any,
    form: Callable[[Any], Function],
    direction: Pass,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Time ``"forward"``, with nothing recorded, or ``"both"``; rates are by the least work."""
    call = shape.make(dtype, 0, torch.device("cpu"))
    function = form(shape)
    truth = operation.truth(operation.definition, call)
    for name, found in results(function, call).items():
        if name in truth and found.is_floating_point():
            error = (found - truth[name]).norm() / truth[name].norm()
            assert error <= TOLERANCE, f"{name} is {error:.1e} off"
        elif name in truth:
            share = (found != truth[name]).double().mean()
            assert share <= 1e-3, f"{name} differs in {100 * share:.1f} %"
    if direction == "forward":
        with torch.no_grad():
            benchmark(function, call)
    else:
        benchmark(results, function, call)
    if benchmark.stats is not None:
        work = shape.work(direction, dtype)
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["gflops"] = work.flops / seconds / 1e9
        benchmark.extra_info["gb_per_s"] = work.bytes / seconds / 1e9
