"""Where the time of training steps went, from a PyTorch profiler trace.

Every profiled operation's own time goes to a phase of the step (the range of the main thread in
which it ran) and a part (what kind of work it is, by the operation's or its caller's name). The
parts whose arithmetic is counted (``cost.py``) are set against what it takes at the device's peak.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch.autograd import DeviceType

from fastbeit.training.cost import StudentFlops, TokenizerFlops

PREFIX = "fastbeit: "
"""Begins the names of the ranges that mark phases."""
PHASES = ("load", "tokenize", "forward", "backward", "update")

# The first pattern that fits an operation's name, or that of an operation it was called by, names
# the part. On a GPU an operation's time is that of the kernels it launched.
PARTS: tuple[tuple[str, str], ...] = (
    ("attention", r"scaled_dot_product|flash|attention_(packed_)?(for|back)ward|\bbmm\b|baddbmm"),
    ("attention", r"(?<!log)_softmax|\bsoftmax"),
    ("loss and argmax", r"log_softmax|nll_loss|cross_entropy|argmax"),
    ("relative table", r"embedding_dense_backward|expand_(for|back)ward"),
    ("norms and residuals", r"layer_norm|scale_residual"),
    ("convolutions", r"convolution|conv2d"),
    ("linear layers", r"\b(add)?mm\b|\blinear\b|linear_pointwise|packed_linear|matmul"),
    ("GELU", r"gelu"),
    ("optimizer", r"adam|foreach"),
    ("communication", r"c10d|gloo|nccl|all_?gather|reduce_scatter|all_?reduce|broadcast"),
    ("compiled code", r"triton_|cpp_fused|CompiledFunction"),
    ("copies and casts", r"\b(copy_|_to_copy|contiguous|clone|cat|gather|index_select|scatter"
     r"|scatter_add_|fill_|zero_|chunk_cat|split_with_sizes_copy)\b"),
)  # fmt: skip
OTHER = "other"
_COMPILED = tuple((name, re.compile(pattern)) for name, pattern in PARTS)


class Event(Protocol):
    """What is read of ``torch.autograd.profiler_util.FunctionEvent``; times in microseconds."""

    name: str
    time_range: Any
    cpu_parent: Any
    device_type: Any

    @property
    def self_cpu_time_total(self) -> float: ...

    @property
    def self_device_time_total(self) -> float: ...


@dataclass(frozen=True)
class Row:
    """Time of one part of one phase, a step.

    flops are counted for a step of this rank; limit_ms is how long they take at the peak. None
    where nothing is counted or no peak is known.
    """

    phase: str
    part: str
    ms: float
    share: float
    flops: float | None = None
    limit_ms: float | None = None

    @property
    def tflops_per_s(self) -> float | None:
        return None if self.flops is None or not self.ms else self.flops / self.ms / 1e9

    @property
    def of_limit(self) -> float | None:
        return None if self.limit_ms is None or not self.ms else self.limit_ms / self.ms


def part_of(event: Event) -> str:
    """The part that an operation's time belongs to: its own name first, then its callers'."""
    seen: Any = event
    while seen is not None:
        for part, pattern in _COMPILED:
            if pattern.search(seen.name):
                return part
        seen = seen.cpu_parent
    return OTHER


def time_by_part(events: Iterable[Event], *, on_gpu: bool) -> dict[tuple[str, str], float]:
    """Microseconds by (phase, part), over all steps in the trace.

    On a GPU the time is that of the kernels an operation launched; ``load`` is the host's wait all
    the same. Time of a phase in no operation (Python, the engine) is its ``other`` on a CPU.
    The device's own events are left out: kernels count with the operation that launched them.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = sorted(
        (event.time_range.start, event.time_range.end, event.name.removeprefix(PREFIX))
        for event in events
        if event.name.startswith(PREFIX)
    )
    starts = [start for start, _, _ in ranges]
    times: defaultdict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if event.name.startswith(PREFIX):
            phase = event.name.removeprefix(PREFIX)
            if phase == "load" or not on_gpu:
                times[phase, "waiting" if phase == "load" else OTHER] += event.self_cpu_time_total
            continue
        place = bisect_right(starts, event.time_range.start) - 1
        if place < 0 or event.time_range.start >= ranges[place][1] or ranges[place][2] == "load":
            continue
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own:
            times[ranges[place][2], part_of(event)] += own
    return dict(times)


def counted(
    student: StudentFlops, tokenizer: TokenizerFlops, images: int
) -> dict[tuple[str, str], float]:
    """FLOPs of ``images`` images by (phase, part), as the formulas have them."""
    linear = student.block_linears + student.head
    per_image = {
        ("tokenize", "convolutions"): tokenizer.body,
        ("tokenize", "linear layers"): tokenizer.head,
        ("forward", "convolutions"): student.patch_embedding,
        ("forward", "linear layers"): linear,
        ("forward", "attention"): student.attention,
        ("backward", "convolutions"): student.patch_embedding,
        ("backward", "linear layers"): 2 * linear,
        ("backward", "attention"): 2 * student.attention,
    }
    return {key: float(flops) * images for key, flops in per_image.items()}


def rows(
    times_us: Mapping[tuple[str, str], float],
    steps: int,
    flops: Mapping[tuple[str, str], float],
    peaks: Mapping[str, float | None],
) -> list[Row]:
    """The table, phase by phase, within a phase the longest first.

    Args:
        flops: of one step, by (phase, part).
        peaks: FLOP/s by phase.
    """
    total = sum(times_us.values())
    found = []
    for (phase, part), spent_us in times_us.items():
        work, peak = flops.get((phase, part)), peaks.get(phase)
        limit_ms = 1e3 * work / peak if work is not None and peak else None
        ms = spent_us / steps / 1e3
        found.append(Row(phase, part, ms, spent_us / total if total else 0.0, work, limit_ms))
    order = {phase: place for place, phase in enumerate(PHASES)}
    return sorted(found, key=lambda row: (order.get(row.phase, len(order)), -row.ms))


def table(found: list[Row], least_share: float = 0.002) -> str:
    """The rows as text; those below ``least_share`` of the step are summed in a line a phase."""
    head = ("phase", "part", "ms/step", "share", "GFLOP", "TFLOP/s", "limit ms", "of limit")
    lines: list[tuple[str, ...]] = [head]
    phases = list(dict.fromkeys(row.phase for row in found))
    for phase in phases:
        small = [row for row in found if row.phase == phase and row.share < least_share]
        for row in found:
            if row.phase == phase and row not in small:
                lines.append(_cells(row))
        if small:
            ms, share = sum(row.ms for row in small), sum(row.share for row in small)
            lines.append(_cells(Row(phase, f"{len(small)} small parts", ms, share)))
    total_ms = sum(row.ms for row in found)
    limit_ms = sum(row.limit_ms or 0.0 for row in found)
    known = any(row.limit_ms is not None for row in found)
    flops = sum(row.flops or 0.0 for row in found)
    lines.append(_cells(Row("step", "", total_ms, 1.0, flops, limit_ms if known else None)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return (
        row.phase,
        row.part,
        f"{row.ms:.2f}",
        f"{row.share:.1%}",
        "–" if row.flops is None else f"{row.flops / 1e9:.1f}",
        number(row.tflops_per_s, ".2f"),
        number(row.limit_ms, ".2f"),
        number(row.of_limit, ".0%"),
    )
