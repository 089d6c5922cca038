"""Checks of one case on a device. Each gives rows; a failed check is a row, not an exception.

`check_case` takes the function as an argument, so that a wrong one can be shown to be caught.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.call import Call, Function, Outputs, results
from benchmarks.operation import Case, Operation

Emit = Callable[[dict[str, Any]], None]
# Larger inputs are not copied into memory of NaN: small ones show the same mistakes.
SURROUNDED_BYTES = 2**26


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


def surrounded(tensor: Tensor, by: float) -> Tensor:
    """The same values as a view into a larger tensor of ``by``, rows (of the dimension that lies
    together) apart from each other: who reads beside them, gets that."""
    if not tensor.is_floating_point() or tensor.dim() == 0:
        return tensor
    order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
    sizes = [tensor.shape[dim] for dim in order]
    # Rows stay a multiple of 16 bytes apart, as slices of real tensors are.
    larger = [size + 1 for size in sizes[:-1]] + [-(-sizes[-1] // 8) * 8 + 8]
    memory = tensor.new_full(larger, by)
    view = memory[tuple(slice(0, size) for size in sizes)]
    return view.permute([order.index(dim) for dim in range(tensor.dim())]).copy_(tensor)


def differing(mine: Outputs, theirs: Outputs) -> list[str]:
    """Names of tensors that are not bit for bit the same."""
    return [
        name
        for name in mine
        if mine[name].shape != theirs[name].shape or not torch.equal(mine[name], theirs[name])
    ]


def moved(mine: Outputs, theirs: Outputs, dtype: torch.dtype | None = None) -> list[str]:
    """Names of tensors that are not the same but for rounding, theirs or that to ``dtype``."""
    wrong = []
    for name, tensor in mine.items():
        if not tensor.is_floating_point():
            same = torch.equal(tensor, theirs[name])
        else:
            difference = (tensor.float() - theirs[name].float()).norm()
            eps = torch.finfo(dtype or tensor.dtype).eps
            same = bool(difference <= eps * tensor.float().norm())
        if not same:
            wrong.append(name)
    return wrong


def check_case(
    operation: Operation,
    case: Case,
    dtype: str,
    device: torch.device,
    emit: Emit,
    function: Function | None = None,
    first_seed: int = 0,
) -> None:
    """Error against float64 for every seed; then, once, what has to hold bit for bit."""
    function = operation.ours("triton") if function is None else function

    def row(check: str, passed: bool, **more: Any) -> None:
        head = {"kind": "correctness", "check": check, "case": case.name, "dtype": dtype}
        emit({**head, "status": "pass" if passed else "fail", **more})

    call: Call | None = None
    mine: Outputs = {}
    judges: tuple[Outputs, Outputs] | None = None
    for seed in range(first_seed, first_seed + case.seeds):
        call = case.make(dtype, seed, device)
        mine = results(function, call)
        plain = results(operation.definition, call)
        truth = operation.truth(operation.definition, call)
        judged = operation.judge(call, mine, plain, truth)
        row(
            "error",
            not judged.reasons,
            seed=seed,
            reason="; ".join(judged.reasons),
            worst_ratio=judged.worst_ratio,
            tensors=judged.tensors,
        )
        judges = (plain, truth) if call.bytes() <= SURROUNDED_BYTES else None
        del plain, truth
    assert call is not None

    changed = differing(mine, results(function, call))
    row("repeatable", not changed, reason=_names("differ between two runs", changed))
    with fresh_memory_is_nan():
        changed = differing(mine, results(function, call))
    row("writes everything", not changed, reason=_names("hold what was in memory", changed))
    if call.size > 1:
        rounds = operation.shares_tiles and device.type == "cpu"
        changed = _depends_on_batch(function, call, mine, moved if rounds else differing)
        row("batch independent", not changed, reason=_names("depend on the batch", changed))
    if judges is not None:
        # Rows apart may compile to another kernel, which rounds elsewhere: it is held to float64 as
        # the first was, and to the bit to itself, whatever lies around.
        one, other = (
            results(function, call.everything(partial(_surrounded, by)))
            for by in (float("nan"), 1.0)
        )
        changed = differing(one, other)
        reasons = [
            _names("change with memory around", changed),
            *operation.judge(call, one, *judges).reasons,
        ]
        row("reads nothing else", not any(reasons), reason="; ".join(filter(None, reasons)))
    for name, check in operation.checks.items():
        reason = check(function, call, mine)
        if reason is not None:
            row(name, not reason, reason=reason)


def _surrounded(by: float, _name: str, tensor: Tensor) -> Tensor:
    return surrounded(tensor, by)


def _names(what: str, names: list[str]) -> str:
    return f"{', '.join(names)} {what}" if names else ""


def _depends_on_batch(
    function: Function,
    call: Call,
    mine: Outputs,
    compare: Callable[[Outputs, Outputs], list[str]],
) -> list[str]:
    """The last place of the batch alone gives the same as among the others."""
    alone = results(function, call.images(call.size - 1, call.size))
    own = [name for name in mine if name in call.batched or name.removeprefix("d") in call.batched]
    among = {name: mine[name][call.size - 1 :] for name in own}
    return compare(among, alone)
