"""Whether PyTorch's machinery sees ordinary operators on the device: compile, graphs, checkpoints.

Each check gives the reason for which it failed, or an empty string.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import CASES, Call, Case, Operation, make_call, ours
from benchmarks.gpu.correctness import Emit, Results, differing, results

BY_NAME = {case.name: case for case in CASES}


def integration_cases(shrink: bool) -> list[Case]:
    names = ("BEiT at 224 pixels", "query subset", "table to output")
    return [BY_NAME[name].shrunk() if shrink else BY_NAME[name] for name in names]


def under_compile(call: Call, backend: str, operation: Operation = ours) -> str:
    """One graph, forward and backward, and the same bits as without."""
    expected = results(operation, call)

    def flat(leaves: dict[str, Tensor]) -> Tensor:
        return operation(replace(call, leaves=leaves))

    torch._dynamo.reset()
    function = torch.compile(flat, fullgraph=True, dynamic=False, backend=backend)
    found = results(lambda call: function(call.leaves), call)
    # The compiled graph may sum and cast around the operator in another order.
    return _near(found, expected)


def _near(found: Results, expected: Results) -> str:
    wrong = [
        name
        for name, tensor in expected.items()
        if not torch.allclose(
            found[name], tensor, rtol=4 * torch.finfo(tensor.dtype).eps, atol=1e-6
        )
    ]
    return f"{', '.join(wrong)} differ from eager" if wrong else ""


def under_cuda_graph(call: Call, other: Call, operation: Operation = ours) -> str:
    """Captured with the inputs of ``call``, replayed with those of ``other``: bits as in eager."""
    expected = results(operation, other)
    leaves = {name: tensor.detach().clone() for name, tensor in call.leaves.items()}
    static = replace(
        call,
        leaves=leaves,
        dout=call.dout.clone(),
        positions=None if call.positions is None else call.positions.clone(),
    )
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # kernels are compiled before the capture
            results(operation, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(operation, static)
    for name, tensor in other.leaves.items():
        leaves[name].copy_(tensor)
    static.dout.copy_(other.dout)
    if static.positions is not None and other.positions is not None:
        static.positions.copy_(other.positions)
    graph.replay()
    torch.cuda.synchronize()
    changed = differing(captured, expected)
    return f"{', '.join(changed)} differ between a replay and eager" if changed else ""


def under_checkpoint(call: Call, operation: Operation = ours) -> str:
    """Recomputed in the backward: the same bits."""
    from torch.utils.checkpoint import checkpoint

    def recomputed(inner: Call) -> Tensor:
        names = list(inner.leaves)

        def run(*leaves: Tensor) -> Tensor:
            return operation(replace(inner, leaves=dict(zip(names, leaves, strict=True))))

        out = checkpoint(run, *inner.leaves.values(), use_reentrant=False)
        assert isinstance(out, Tensor)
        return out

    changed = differing(results(recomputed, call), results(operation, call))
    return f"{', '.join(changed)} differ under checkpointing" if changed else ""


def under_autocast(call: Call, operation: Operation = ours) -> str:
    """fp32 inputs under autocast: q, k, v are cast to bf16, bias and table keep their precision."""
    wide = call.to(torch.float32)
    device = call.dout.device.type

    def cast(inner: Call) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return operation(inner)

    found = results(cast, wide)
    if found["out"].dtype != torch.bfloat16:
        return f"the output is {found['out'].dtype}, not bfloat16"
    half = {
        name: tensor.to(torch.bfloat16) if name in ("q", "k", "v", "qkv") else tensor
        for name, tensor in wide.leaves.items()
    }
    expected = results(operation, replace(wide, leaves=half))
    changed = [
        name for name in expected if not torch.equal(found[name].float(), expected[name].float())
    ]
    return f"{', '.join(changed)} differ under autocast" if changed else ""


def check_integration(
    name: str, dtype: str, device: torch.device, emit: Emit, *, shrink: bool
) -> None:
    """All four, on one case; each a row."""
    case = next(case for case in integration_cases(shrink) if case.name == name)
    call, other = (make_call(case, dtype, seed, device) for seed in (11, 12))
    graphs = device.type == "cuda"
    checks: dict[str, Callable[[], Any]] = {
        "torch.compile": lambda: under_compile(call, "inductor" if graphs else "aot_eager"),
        "checkpointing": lambda: under_checkpoint(call),
        "autocast": lambda: under_autocast(call),
    }
    if graphs:
        checks["CUDA graph"] = lambda: under_cuda_graph(call, other)
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
