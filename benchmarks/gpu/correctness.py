"""Checks of one case on a device. Each gives rows; a failed check is a row, not an exception.

`check_case` takes the operation as an argument, so that a wrong one can be shown to be caught.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Call, Case, Operation, by_definition, make_call, ours
from benchmarks.gpu.judge import judge

Emit = Callable[[dict[str, Any]], None]
Results = dict[str, Tensor]
# Scores in float64 of this many elements at a time (half a GB with what autograd keeps).
TRUTH_ELEMENTS = 16_000_000


def results(operation: Operation, call: Call) -> Results:
    """The output and the gradient of every leaf, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.leaves.items()}
    out = operation(replace(call, leaves=leaves))
    gradients = torch.autograd.grad(out, list(leaves.values()), call.dout.to(out.dtype))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), **named}


def truth_of(call: Call) -> Results:
    """`results` in float64, a few images at a time; gradients of what they share are summed."""
    call = call.to(torch.float64)
    case = call.case
    step = max(1, TRUTH_ELEMENTS // max(1, case.heads * case.queries * case.keys))
    if case.kind == "expand" or step >= case.batch:
        return results(by_definition, call)
    parts = [
        results(by_definition, call.images(first, min(first + step, case.batch)))
        for first in range(0, case.batch, step)
    ]
    shared = {"dtable"} | ({"dbias"} if case.bias in ("heads", "keys") else set())
    return {
        name: torch.stack([part[name] for part in parts]).sum(0)
        if name in shared
        else torch.cat([part[name] for part in parts])
        for name in parts[0]
    }


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Memory that nothing has been written to holds NaN, also what operators allocate."""
    # A module whose one setting is a property, which type checkers don't see.
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
            deterministic.fill_uninitialized_memory = filled


def surrounded_by_nan(tensor: Tensor) -> Tensor:
    """The same values as a view into a larger tensor of NaN, rows (of the last dimension) apart
    from each other: whoever reads beside them spoils the result."""
    # Rows stay a multiple of 16 bytes apart, as slices of real tensors are.
    shape = [size + 1 for size in tensor.shape[:-1]] + [-(-tensor.shape[-1] // 8) * 8 + 8]
    memory = tensor.new_full(shape, float("nan"))
    view = memory[tuple(slice(0, size) for size in tensor.shape)]
    return view.copy_(tensor)


def differing(mine: Results, theirs: Results, names: list[str] | None = None) -> list[str]:
    """Names of tensors that are not bit for bit the same."""
    return [
        name
        for name in names or list(mine)
        if mine[name].shape != theirs[name].shape or not torch.equal(mine[name], theirs[name])
    ]


def moved(mine: Results, theirs: Results) -> list[str]:
    """Names of tensors that are not the same but for rounding: another memory layout may compile to
    another kernel. Whatever read a NaN is far off."""
    return [
        name
        for name in mine
        if not (mine[name].float() - theirs[name].float()).norm()
        <= torch.finfo(mine[name].dtype).eps * mine[name].float().norm()
    ]


def check_case(
    case: Case,
    dtype: str,
    device: torch.device,
    emit: Emit,
    operation: Operation = ours,
    first_seed: int = 0,
) -> None:
    """Error against float64 for every seed; then, once, what has to hold bit for bit."""

    def row(check: str, passed: bool, **more: Any) -> None:
        head = {"kind": "correctness", "check": check, "case": case.name, "dtype": dtype}
        emit({**head, "status": "pass" if passed else "fail", **more})

    call: Call | None = None
    mine: Results = {}
    for seed in range(first_seed, first_seed + case.seeds):
        call = make_call(case, dtype, seed, device)
        mine = results(operation, call)
        plain, truth = results(by_definition, call), truth_of(call)
        verdicts = {
            name: judge(mine[name], plain[name], truth[name], call.dout.dtype) for name in truth
        }
        reasons = [f"{name}: {v.reason}" for name, v in verdicts.items() if not v.passed]
        worst = max(v.norm / v.plain_norm if v.plain_norm else 0.0 for v in verdicts.values())
        row(
            "error",
            not reasons,
            seed=seed,
            reason="; ".join(reasons),
            worst_ratio=worst,
            tensors={name: verdict.as_row() for name, verdict in verdicts.items()},
        )
        del plain, truth
    assert call is not None

    changed = differing(mine, results(operation, call))
    row("repeatable", not changed, reason=_names("differ between two runs", changed))
    with fresh_memory_is_nan():
        changed = differing(mine, results(operation, call))
    row("writes everything", not changed, reason=_names("hold what was in memory", changed))
    if case.batch > 1 and case.kind != "expand":
        changed = _depends_on_batch(operation, call, mine)
        row("batch independent", not changed, reason=_names("depend on the batch", changed))
    if case.batch <= 4:
        leaves = {name: surrounded_by_nan(tensor) for name, tensor in call.leaves.items()}
        inside = replace(call, leaves=leaves, dout=surrounded_by_nan(call.dout))
        changed = moved(mine, results(operation, inside))
        row("reads nothing else", not changed, reason=_names("change with memory around", changed))
    if call.positions is not None:
        reason = _empty_slots(operation, call, mine)
        row("empty slots", not reason, reason=reason)


def _names(what: str, names: list[str]) -> str:
    return f"{', '.join(names)} {what}" if names else ""


def _depends_on_batch(operation: Operation, call: Call, mine: Results) -> list[str]:
    """The last image alone gives the same bits as among the others."""
    batch = call.case.batch
    alone = results(operation, call.images(batch - 1, batch))
    own = [name for name in ("out", "dq", "dk", "dv", "dqkv") if name in mine]
    return differing(alone, {name: mine[name][batch - 1 :] for name in own}, own)


def _empty_slots(operation: Operation, call: Call, mine: Results) -> str:
    """Empty slots are zero, and what lies in them changes nothing."""
    assert call.positions is not None
    empty = call.positions < 0
    if not (mine["out"][empty] == 0).all() or not (mine["dq"][empty] == 0).all():
        return "rows of empty slots are not zero"
    q, dout = call.leaves["q"].clone(), call.dout.clone()
    q[empty], dout[empty] = float("nan"), float("inf")
    spoiled = results(operation, replace(call, leaves={**call.leaves, "q": q}, dout=dout))
    return _names("change with the contents of empty slots", differing(spoiled, mine))
