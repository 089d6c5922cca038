"""What the harness knows of an operation. One folder or module of `benchmarks.operations` fills it.

A `Shape` makes random inputs and counts the least work; a `Case` is a shape whose results are
checked, a `Problem` one that is timed, a `Peer` someone who is timed on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from benchmarks.call import Call, Function, Outputs, define_in_float64
from benchmarks.judge import Judgement, judge_results
from benchmarks.roofline import Work
from benchmarks.targets import OURS as OURS
from benchmarks.targets import Target

Pass = Literal["forward", "backward", "both", "no gradient"]
PASSES: Mapping[Pass, str] = {
    "forward": "forward, recorded for a backward where there is one",
    "backward": "backward alone, on a kept graph",
    "both": "forward and backward",
    "no gradient": "forward with nothing recorded, as in validation",
}
SAME = "same"


class Shape(Protocol):
    """Sizes and kind of a call."""

    def make(self, dtype: torch.dtype, seed: int, device: torch.device) -> Call:
        """Fresh random inputs, in ``dtype`` as training has them; never zeros."""
        ...

    def shrunk(self) -> Any:
        """The same kind of call, small enough to interpret."""
        ...

    def work(self, direction: Pass, dtype: torch.dtype) -> Work:
        """Least FLOPs and bytes."""
        ...

    def describe(self) -> str:
        """Sizes, for a table."""
        ...


@dataclass(frozen=True)
class Case:
    """A call whose results are checked. ``why``: what its shape is there for.

    ``machinery``: also under torch.compile, graphs, checkpoints, autocast. ``sanitized``: also
    under compute-sanitizer, which is slow.
    """

    name: str
    why: str
    shape: Any
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    seeds: int = 3
    machinery: bool = False
    sanitized: bool = False

    def shrunk(self) -> Case:
        return replace(self, shape=self.shape.shrunk(), dtypes=("float32",), seeds=1)

    def make(self, dtype: str, seed: int, device: torch.device) -> Call:
        return self.shape.make(getattr(torch, dtype), seed, device)


@dataclass(frozen=True)
class Problem:
    """A call that is timed. ``worth``: 0 for what targets are about, then what else is of use.

    ``kernel_bytes``: of one kernel of ours, by a part of its name, what it reads and writes.
    """

    name: str
    shape: Any
    dtype: str = "bfloat16"
    passes: tuple[Pass, ...] = ("forward", "backward")
    worth: int = 1
    kernel_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def work(self, direction: Pass) -> Work:
        return self.shape.work(direction, self.torch_dtype)

    def shrunk(self) -> Problem:
        return replace(self, shape=self.shape.shrunk(), dtype="float32")

    def make(self, seed: int, device: torch.device) -> Call:
        return self.shape.make(self.torch_dtype, seed, device).recorded()

    def input_sets(self, device: torch.device, cache_bytes: int, seed: int = 0) -> list[Call]:
        """Sets that together are three times the cache: a round of them finds nothing in it."""
        sets = [self.make(seed, device)]
        wanted = -(-3 * cache_bytes // max(1, sets[0].bytes()))
        # Launches of a sample are queued before it begins, and a queue holds about a thousand.
        count = min(max(2, wanted), 128)
        return sets + [self.make(seed + number, device) for number in range(1, count)]


@dataclass(frozen=True)
class Peer:
    """Someone who is timed. ``form(shape)`` builds the function, or raises `Unavailable`.

    ``slow``: it compiles for many seconds. ``less``: what it leaves undone, which makes it a
    yardstick and no rival; ``without``: leaves that it doesn't take. ``fits``: shapes it is for.
    """

    name: str
    form: Callable[[Any], Function]
    ours: bool = False
    slow: bool = False
    less: str = ""
    without: tuple[str, ...] = ()
    fits: Callable[[Any], bool] = lambda shape: True


def largest_error(_call: Call, found: Outputs, truth: Outputs) -> float:
    """The largest relative error by norm of what both hold in floating point; NaN stays NaN."""
    errors = []
    for name, value in found.items():
        if name in truth and value.is_floating_point():
            difference = (value.float() - truth[name].float()).norm()
            errors.append((difference / truth[name].float().norm().clamp_min(1e-30)).item())
    # max() of NaN depends on the order.
    return float("nan") if any(error != error for error in errors) else max(errors, default=0.0)


# A check of an operation's own: (ours, call, our results) -> why it fails, "" if it holds, or None
# where it doesn't apply to the call.
Check = Callable[[Function, Call, Outputs], str | None]


@dataclass(frozen=True)
class Operation:
    """All that is known of an operation.

    ``definition``: the formulas, apart from `fastbeit_kernels.reference`; in float64 the truth, in
    a lower precision "plain PyTorch", whose error is the measure. ``refusable``: leaves that some
    peers take but give no gradient. ``cast``: leaves and givens that autocast casts to 16 bits.
    ``share``: of the time for timings, what it may take while others wait.
    """

    name: str
    about: str
    ours: Callable[[Any], Function]
    definition: Function
    cases: tuple[Case, ...]
    problems: tuple[Problem, ...]
    peers: tuple[Peer, ...]
    targets: tuple[Target, ...]
    share: float
    cast: frozenset[str] = frozenset()
    cast_exactly: bool = True
    """Under autocast the same bits as from cast inputs; or, cast in the kernel, fewer roundings."""
    shares_tiles: bool = False
    """Rows of several images lie in one tile. The interpreter's products then depend, by rounding,
    on a row's place in the tile (NumPy's do); a GPU's don't."""
    refusable: tuple[str, ...] = ()
    checks: Mapping[str, Check] = field(default_factory=dict)
    truth: Callable[[Function, Call], Outputs] = define_in_float64
    judge: Callable[[Call, Outputs, Outputs, Outputs], Judgement] = judge_results
    error: Callable[[Call, Outputs, Outputs], float] = largest_error
    error_allowed: float | None = None
    """In a peer's result before it is timed; None: by its precision."""

    def peers_for(self, shape: Any) -> tuple[Peer, ...]:
        return tuple(peer for peer in self.peers if peer.fits(shape))
