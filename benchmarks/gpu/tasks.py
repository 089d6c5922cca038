"""What a worker does with a task. Rows go out as soon as they are known."""

from __future__ import annotations

import json
import os
from typing import Any, Protocol

import torch

from benchmarks.call import results
from benchmarks.gpu import (
    contest,
    correctness,
    curve,
    environment,
    integration,
    kernels,
    replay,
)
from benchmarks.operations import case_by_name, problem_by_name
from benchmarks.roofline import Ceiling
from benchmarks.timing import CudaTimer, Limits, Timer, WallTimer

Row = dict[str, Any]


class Events(Protocol):
    def row(self, row: Row) -> None: ...
    def step(self, step: str) -> None: ...


def run(payload: Row, events: Events) -> None:
    """``payload["kind"]`` names the task, ``payload["dry"]`` asks for tiny shapes on the CPU."""
    try:
        _run(payload, events)
    finally:
        if not payload["dry"]:  # eight processes share the device's memory
            torch.cuda.empty_cache()


def _run(payload: Row, events: Events) -> None:
    dry = payload["dry"]
    device = torch.device("cpu" if dry else "cuda")
    timer: Timer = WallTimer() if dry else CudaTimer()
    match payload["kind"]:
        case "environment":
            events.row({"kind": "device", **environment.of_device(device)})
        case "ceilings":
            events.row({"kind": "ceilings", **environment.ceilings(device, timer)})
        case "correctness":
            operation, case = case_by_name(payload["case"])
            case = case.shrunk() if dry else case
            try:
                correctness.check_case(operation, case, payload["dtype"], device, events.row)
            except torch.OutOfMemoryError:
                events.row(skipped(payload, "the device's memory is too small for this case"))
        case "once":
            for name in payload["cases"]:
                operation, case = case_by_name(name)
                case = case.shrunk() if dry else case
                dtype = payload["dtype"] if payload["dtype"] in case.dtypes else case.dtypes[0]
                found = results(operation.ours("triton"), case.make(dtype, 0, device))
                for result, tensor in found.items():
                    events.step(f"{name}, {result}: {tensor.float().norm().item():.6g}")
        case "integration":
            operation, case = case_by_name(payload["case"])
            case = case.shrunk() if dry else case
            integration.check_integration(operation, case, payload["dtype"], device, events.row)
        case "curve":
            curve.check_curve(payload["dtype"], device, events.row, shrink=dry)
        case "replay":
            replay.check_replay(payload["dtype"], device, events.row, shrink=dry)
        case "timing":
            _timing(payload, events, device, timer)
        case other:
            raise ValueError(f"no task is called {other!r}")


def skipped(payload: Row, reason: str) -> Row:
    return {
        "kind": "correctness",
        "check": "error",
        "case": payload["case"],
        "dtype": payload["dtype"],
        "status": "skipped",
        "reason": reason,
    }


def _timing(payload: Row, events: Events, device: torch.device, timer: Timer) -> None:
    dry = payload["dry"]
    operation, problem = problem_by_name(payload["problem"])
    if dry:
        problem = problem.shrunk()
    ceiling = Ceiling(**payload["ceiling"]) if payload.get("ceiling") else None
    limits = Limits(0.0, 2, 2, 0) if dry else Limits(**payload.get("limits", {}))
    cache_bytes = 0 if dry else torch.cuda.get_device_properties(device).L2_cache_size
    contest.run_problem(
        operation,
        problem,
        events.row,
        events.step,
        timer=timer,
        limits=limits,
        device=device,
        ceiling=ceiling,
        cache_bytes=cache_bytes,
        slow=payload["slow"],
        excluded=payload.get("excluded", {}),
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not payload["slow"]:
        events.step("time of each kernel")
        kernels.emit_kernel_times(operation, problem, device, ceiling, events.row)


def sanitizer_main() -> None:
    """A task without events, for a sanitizer to watch: rows go to standard output."""

    class Printed:
        def row(self, row: Row) -> None:
            print(json.dumps(row), flush=True)

        def step(self, step: str) -> None:
            print(step, flush=True)

    run(json.loads(os.environ["FASTBEIT_SANITIZED_TASK"]), Printed())
