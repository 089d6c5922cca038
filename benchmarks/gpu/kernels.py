"""Device time of each kernel of our own calls, by PyTorch's profiler, for whoever tunes them.

These are sums over a few calls under the profiler and no substitute for the timings; the shares are
what they are good for. Where a problem says what one kernel moves, the row says how much of the
copy's bandwidth that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.call import results
from benchmarks.operation import Operation, Problem
from benchmarks.roofline import Ceiling

CALLS = 5


def emit_kernel_times(
    operation: Operation,
    problem: Problem,
    device: torch.device,
    ceiling: Ceiling | None,
    emit: Callable[[dict[str, Any]], None],
) -> None:
    """A row of kernel name → microseconds a call, of all passes together."""
    row: dict[str, Any] = {"kind": "kernels", "problem": problem.name}
    if device.type != "cuda":
        emit({**row, "status": "skipped", "reason": "kernels are profiled on a GPU only"})
        return
    try:
        times = _kernel_times(operation, problem, device)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        emit({**row, "status": "unavailable", "reason": reason})
        return
    fractions = copy_fractions(times, problem.kernel_bytes, ceiling)
    emit({**row, "status": "ok", "us_per_call": times, "fraction_of_copy": fractions})


def copy_fractions(
    times: Mapping[str, float], moved: Mapping[str, int], ceiling: Ceiling | None
) -> dict[str, float]:
    """Of the named kernels (all whose name contains the part, together): share of the copy's
    bandwidth."""
    found: dict[str, float] = {}
    for part, count in moved.items():
        us = sum(time for name, time in times.items() if part in name)
        if us > 0 and ceiling is not None:
            found[part] = count / us / 1e6 / ceiling.tb_per_s
    return found


def _kernel_times(operation: Operation, problem: Problem, device: torch.device) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    function = operation.ours("triton")
    sets = [problem.make(seed, device) for seed in range(2)]
    results(function, sets[0])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for number in range(CALLS):
            results(function, sets[number % 2])
        torch.cuda.synchronize()
    times = {
        event.key[:120]: event.self_device_time_total / CALLS
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    }
    return dict(sorted(times.items(), key=lambda item: -item[1]))
