"""Whether PyTorch's machinery sees ordinary operators on the device: compile, graphs, checkpoints.

Each check gives the reason for which it failed, or an empty string.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.call import Call, Function, Outputs, results
from benchmarks.gpu.correctness import Emit, differing, moved
from benchmarks.operation import Case, Operation


def under_compile(call: Call, backend: str, function: Function) -> str:
    """One graph, forward and backward, and the same bits as without."""
    expected = results(function, call)

    def flat(leaves: dict[str, Tensor]) -> Outputs:
        return function(Call(call.shape, leaves, call.given))

    torch._dynamo.reset()
    compiled = torch.compile(flat, fullgraph=True, dynamic=False, backend=backend)
    found = results(lambda call: compiled(call.leaves), call)
    # The compiled graph may sum and cast around the operator in another order.
    return _near(found, expected)


def _near(found: Outputs, expected: Outputs) -> str:
    wrong = [
        name
        for name, tensor in expected.items()
        if not torch.allclose(found[name], tensor, rtol=_rtol(tensor.dtype), atol=1e-6)
    ]
    return f"{', '.join(wrong)} differ from eager" if wrong else ""


def _rtol(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def under_cuda_graph(call: Call, other: Call, function: Function) -> str:
    """Captured with the inputs of ``call``, replayed with those of ``other``: bits as in eager."""
    expected = results(function, other)
    static = call.everything(lambda _, tensor: tensor.clone())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # kernels are compiled before the capture
            results(function, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(function, static)
    for mine, theirs in zip(_tensors(static), _tensors(other), strict=True):
        mine.copy_(theirs)
    graph.replay()
    torch.cuda.synchronize()
    changed = differing(captured, expected)
    return f"{', '.join(changed)} differ between a replay and eager" if changed else ""


def _tensors(call: Call) -> list[Tensor]:
    return [*call.leaves.values(), *call.given.values(), *call.douts.values()]


def under_checkpoint(call: Call, function: Function) -> str:
    """Recomputed in the backward: the same bits."""
    from torch.utils.checkpoint import checkpoint

    def recomputed(inner: Call) -> Outputs:
        names = list(inner.leaves)

        def run(*leaves: Tensor) -> Outputs:
            held = dict(zip(names, leaves, strict=True))
            return function(Call(inner.shape, held, inner.given))

        outputs = checkpoint(run, *inner.leaves.values(), use_reentrant=False)
        assert isinstance(outputs, dict)
        return outputs

    changed = differing(results(recomputed, call), results(function, call))
    return f"{', '.join(changed)} differ under checkpointing" if changed else ""


def under_autocast(
    call: Call, cast: frozenset[str], function: Function, exactly: bool = True
) -> str:
    """fp32 inputs under autocast: those named by ``cast`` become bf16, the others keep theirs. Not
    ``exactly``: but for a rounding to 16 bits."""
    wide = call.to(torch.float32)
    device = next(iter(_tensors(call))).device.type

    def below(inner: Call) -> Outputs:
        with torch.autocast(device, torch.bfloat16):
            return function(inner)

    found = results(below, wide)
    half = wide.everything(lambda name, x: x.to(torch.bfloat16) if name in cast else x)
    expected = results(function, half)
    for name in expected:
        if name in call.douts and found[name].dtype != expected[name].dtype:
            return f"{name} is {found[name].dtype}, expected {expected[name].dtype}"
    wanted, came = ({n: x.float() for n, x in part.items()} for part in (expected, found))
    changed = differing(wanted, came) if exactly else moved(wanted, came, torch.bfloat16)
    return f"{', '.join(changed)} differ under autocast" if changed else ""


def check_integration(
    operation: Operation, case: Case, dtype: str, device: torch.device, emit: Emit
) -> None:
    """All four, on one case; each a row."""
    function = operation.ours("triton")
    call, other = (case.make(dtype, seed, device) for seed in (11, 12))
    graphs = device.type == "cuda"
    checks: dict[str, Callable[[], Any]] = {
        "torch.compile": lambda: under_compile(
            call, "inductor" if graphs else "aot_eager", function
        ),
        "autocast": lambda: under_autocast(call, operation.cast, function, operation.cast_exactly),
    }
    if call.douts:
        checks["checkpointing"] = lambda: under_checkpoint(call, function)
    if graphs:
        checks["CUDA graph"] = lambda: under_cuda_graph(call, other, function)
    else:
        emit(_row("CUDA graph", case, dtype, "skipped", "graphs are captured on a GPU only"))
    for check, run in checks.items():
        try:
            reason = run()
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:600]}"
        emit(_row(check, case, dtype, "fail" if reason else "pass", reason))


def _row(check: str, case: Case, dtype: str, status: str, reason: str) -> dict[str, Any]:
    return {
        "kind": "correctness",
        "check": check,
        "case": case.name,
        "dtype": dtype,
        "status": status,
        "reason": reason,
    }
