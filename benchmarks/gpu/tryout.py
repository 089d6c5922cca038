"""Whether a contestant runs on a problem and is right there, before anybody times it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.call import Call, Function, Outputs, results
from benchmarks.operation import SAME, Operation, Peer, Problem
from benchmarks.peers import Unavailable

Row = dict[str, Any]
Emit = Callable[[Row], None]
Step = Callable[[str], None]


class BrokenDevice(RuntimeError):
    """The CUDA context is lost (an illegal access): only a new process helps."""


@dataclass
class Contestant:
    """``refused``: leaves that the peer takes but gives no gradient."""

    peer: Peer
    function: Function
    error: float
    refused: tuple[str, ...] = ()

    def work(self, direction: str) -> str:
        if self.peer.less:
            return self.peer.less
        if self.refused and direction not in ("forward", "no gradient"):
            return f"no {self.refused[0]} gradient"
        return SAME

    def inputs(self, call: Call) -> Call:
        """What it is given of a call."""
        return call.without(*self.peer.without).detached(*self.refused)


def expected(operation: Operation, call: Call) -> Outputs:
    """Outputs and gradients by the definition in fp32, from the same rounded inputs."""
    return results(operation.definition, call.to(torch.float32))


def tolerance(dtype: torch.dtype) -> float:
    """Relative, by norm: a twin may round everything to its inputs' precision, a few times over."""
    return max(8 * torch.finfo(dtype).eps, 1e-4)


def try_out(
    operation: Operation, peer: Peer, problem: Problem, call: Call, truth: Outputs
) -> Contestant:
    """Build a peer and compare its outputs and gradients with ``truth``; raise if it can't run."""
    refused: tuple[str, ...] = ()
    function = peer.form(problem.shape)
    given = call.without(*peer.without)
    try:
        found = results(function, given)
    except (Unavailable, torch.OutOfMemoryError):
        raise
    except Exception:
        # Some take a bias but refuse it a gradient.
        refused = tuple(name for name in operation.refusable if name in given.leaves)
        if peer.ours or peer.less or not refused or len(refused) == len(given.leaves):
            raise
        function = peer.form(problem.shape)
        try:
            found = results(function, given.detached(*refused))
        except Exception:
            found = None
        if found is None:
            raise
    return Contestant(peer, function, operation.error(given, found, truth), refused)


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
    operation: Operation,
    problem: Problem,
    peers: Sequence[Peer],
    call: Call,
    device: torch.device,
    emit: Emit,
    step: Step,
    excluded: Mapping[str, str],
) -> list[Contestant]:
    """Those who run and are right; a row for each of the others, with its reason."""

    def out(peer: Peer, status: str, reason: str, **more: Any) -> None:
        head = {"kind": "timing", "problem": problem.name, "contestant": peer.name}
        emit({**head, "status": status, "reason": reason, **more})

    limit = operation.error_allowed
    limit = tolerance(problem.torch_dtype) if limit is None else limit
    contestants: list[Contestant] = []
    truths: dict[tuple[str, ...], Outputs] = {}
    for peer in peers:
        if peer.name in excluded:
            out(peer, "failed", excluded[peer.name])
            continue
        step(peer.name)
        started = time.monotonic()
        if peer.without not in truths:
            truths[peer.without] = expected(operation, call.without(*peer.without))
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                contestant = try_out(operation, peer, problem, call, truths[peer.without])
                error = contestant.error
            except Exception as problem_met:
                if not device_is_alive(device):
                    raise BrokenDevice(reason_of(problem_met, heard)) from problem_met
                out(peer, "unavailable", reason_of(problem_met, heard))
                continue
        if not error <= limit:
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
