"""Whether a contestant runs on a problem and is right there, before anybody times it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import definition
from benchmarks.forms import Form, Unavailable
from benchmarks.peers import Peer
from benchmarks.problems import Inputs, Problem

Row = dict[str, Any]
Emit = Callable[[Row], None]
Step = Callable[[str], None]

SAME, NO_BIAS, NO_BIAS_GRADIENT = "same", "no bias", "no bias gradient"


class BrokenDevice(RuntimeError):
    """The CUDA context is lost (an illegal access): only a new process helps."""


@dataclass
class Contestant:
    peer: Peer
    form: Form
    leaves: tuple[str, ...]
    error: float
    bias_gradient: bool

    def work(self, direction: str) -> str:
        if not self.peer.bias:
            return NO_BIAS
        if direction == "backward" and not self.bias_gradient:
            return NO_BIAS_GRADIENT
        return SAME

    def inputs(self, inputs: Inputs) -> Inputs:
        """The leaves, that of the bias without gradient where a peer refuses it one."""
        if self.bias_gradient:
            return inputs
        return without_bias_gradient(inputs)


def without_bias_gradient(inputs: Inputs) -> Inputs:
    leaves = {n: x.detach() if n in ("bias", "table") else x for n, x in inputs.leaves.items()}
    return Inputs(leaves, inputs.index, inputs.grid, inputs.positions, inputs.dout)


def gradients(out: Tensor, inputs: Inputs, leaves: Sequence[str], keep: bool) -> list[Tensor]:
    wanted = [inputs.leaves[name] for name in leaves]
    return list(torch.autograd.grad(out, wanted, inputs.dout, retain_graph=keep))


def expected(problem: Problem, inputs: Inputs, bias: bool) -> dict[str, Tensor]:
    """Output and gradients by the definition in fp32, from the same rounded inputs."""
    wide = {n: x.detach().float().requires_grad_() for n, x in inputs.leaves.items()}
    held = Inputs(wide, inputs.index, inputs.grid, inputs.positions, inputs.dout.float())
    names = [name for name in wide if bias or name not in ("bias", "table")]
    if "table" in wide:
        added = definition.expand(wide["table"], inputs.index)
    else:
        added = wide["bias"]
    if problem.operation == "expand":
        out = added
    else:
        out = definition.attention(*held.qkv(), added if bias else None, inputs.positions)
        out = out.flatten(2)
    found = gradients(out, held, names, keep=False)
    return {"out": out.detach(), **dict(zip(names, found, strict=True))}


def tolerance(dtype: torch.dtype) -> float:
    """Relative, by norm: a twin may round everything to its inputs' precision, a few times over."""
    return max(8 * torch.finfo(dtype).eps, 1e-4)


def largest_error(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    errors = []
    for name, value in found.items():
        error = (value.float() - truth[name]).norm() / truth[name].norm().clamp_min(1e-30)
        errors.append(error.item())
    # max() of NaN depends on the order.
    return float("nan") if any(error != error for error in errors) else max(errors)


def try_out(
    peer: Peer, problem: Problem, inputs: Inputs, truth: Mapping[str, Tensor]
) -> Contestant:
    """Build a peer and compare its output and gradients with ``truth``; raise if it can't run."""
    names = tuple(n for n in problem.leaves if peer.bias or n not in ("bias", "table"))
    form = peer.form(problem)

    def attempt(inputs: Inputs, leaves: tuple[str, ...]) -> float:
        out = form(inputs)
        found = gradients(out, inputs, leaves, keep=False)
        named = dict(zip(leaves, found, strict=True))
        return largest_error({"out": out.detach(), **named}, truth)

    try:
        return Contestant(peer, form, names, attempt(inputs, names), True)
    except (Unavailable, torch.OutOfMemoryError):
        raise
    except Exception:
        fewer = names[:-1]
        if peer.ours or not peer.bias or not fewer:
            raise
        # Some take a bias but refuse it a gradient.
        form = peer.form(problem)
        try:
            error = attempt(without_bias_gradient(inputs), fewer)
        except Exception:
            error = None
        if error is None:
            raise
        return Contestant(peer, form, fewer, error, False)


def reason_of(error: BaseException, heard: Sequence[warnings.WarningMessage]) -> str:
    """The exception, and the warnings in which SDPA explains itself."""
    said = dict.fromkeys(str(warning.message).split("(Triggered")[0].strip() for warning in heard)
    told = f"{type(error).__name__}: {error}" if not isinstance(error, Unavailable) else str(error)
    return " | ".join([" ".join(told.split())[:400], *list(said)[:4]])[:900]


def device_is_alive(device: torch.device) -> bool:
    try:
        torch.ones(1, device=device).item()
    except Exception:
        return False
    return True


def gather(
    problem: Problem,
    peers: Sequence[Peer],
    inputs: Inputs,
    emit: Emit,
    step: Step,
    excluded: Mapping[str, str],
) -> list[Contestant]:
    """Those who run and are right; a row for each of the others, with its reason."""

    def out(peer: Peer, status: str, reason: str, **more: Any) -> None:
        head = {"kind": "timing", "problem": problem.name, "contestant": peer.name}
        emit({**head, "status": status, "reason": reason, **more})

    contestants, truths = [], {}
    for peer in peers:
        if peer.name in excluded:
            out(peer, "failed", excluded[peer.name])
            continue
        step(peer.name)
        started = time.monotonic()
        if peer.bias not in truths:
            truths[peer.bias] = expected(problem, inputs, peer.bias)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                contestant = try_out(peer, problem, inputs, truths[peer.bias])
                error = contestant.error
            except Exception as problem_met:
                if not device_is_alive(inputs.dout.device):
                    raise BrokenDevice(reason_of(problem_met, heard)) from problem_met
                out(peer, "unavailable", reason_of(problem_met, heard))
                continue
        if not error <= tolerance(problem.torch_dtype):
            limit = tolerance(problem.torch_dtype)
            reason = f"relative error {error:.1e} against fp32, allowed {limit:.1e}: not timed"
            out(peer, "wrong", reason, error=error)
            continue
        emit(
            {
                "kind": "prepared",
                "problem": problem.name,
                "contestant": peer.name,
                "error": error,
                "seconds": time.monotonic() - started,
            }
        )
        contestants.append(contestant)
    return contestants
