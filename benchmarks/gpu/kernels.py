"""Device time of each kernel of our own calls, by PyTorch's profiler, for whoever tunes them.

These are sums over a few calls under the profiler and no substitute for the timings; the shares are
what they are good for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.tryout import gradients
from benchmarks.peers import PEERS
from benchmarks.problems import Problem, make_inputs

CALLS = 5


def emit_kernel_times(
    problem: Problem, device: torch.device, emit: Callable[[dict[str, Any]], None]
) -> None:
    """A row of kernel name → microseconds a call, forward and backward together."""
    row: dict[str, Any] = {"kind": "kernels", "problem": problem.name}
    if device.type != "cuda":
        emit({**row, "status": "skipped", "reason": "kernels are profiled on a GPU only"})
        return
    try:
        emit({**row, "status": "ok", "us_per_call": _kernel_times(problem, device)})
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        emit({**row, "status": "unavailable", "reason": reason})


def _kernel_times(problem: Problem, device: torch.device) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    form = next(peer for peer in PEERS if peer.ours).form(problem)
    sets = [make_inputs(problem, seed, device) for seed in range(2)]

    def call(number: int) -> None:
        inputs = sets[number % 2]
        gradients(form(inputs), inputs, problem.leaves, keep=False)

    call(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for number in range(CALLS):
            call(number)
        torch.cuda.synchronize()
    times = {
        event.key[:120]: event.self_device_time_total / CALLS
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    }
    return dict(sorted(times.items(), key=lambda item: -item[1]))
