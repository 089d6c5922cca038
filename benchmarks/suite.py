"""What every suite calls: compare with the twin, time, say how far from the machine's limit.

    def test_step(benchmark):
        measure(benchmark, run, suite="step", part="student", path="fast", check=compare,
                images=8, work=Work(flops, bytes), batch=8)

A row is told apart by (suite, part, path, dtype, sizes). Its twin is the row of the same suite,
part and sizes whose path is "reference" (of the same dtype where there are several): the report and
the regression check compare with that. A peer that can't run here is ``missing(reason)``.
`benchmarks.recorder` writes the rows; pytest-benchmark's own JSON has the same in ``extra_info``.
Suites that the report draws by name: "loader", "step", "levers", "batch sizes", "step parts".
``benchmarks/conftest.py`` sets what holds for a session: its deadline, the compiler's limits, and
that a row whose tensors don't fit is missing.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from benchmarks.ceilings import ceiling
from benchmarks.gpu.environment import commit, version_of
from benchmarks.roofline import Work
from benchmarks.timing import quantile
from fastbeit import environment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUND_S = 0.02
"""A sample repeats a quick call until it lasts this long: below, the clock is what's timed."""
QUICK_ROUNDS = 11
"""Samples of a quick call at least: they take a quarter of a second, and settle the median."""
GPU_SAMPLED_S = 0.5
"""What the samples of a call that was warmed up take together at least, on a GPU."""
WARM_UPS = 0 if DEVICE == "cpu" else 2
"""Of a model's calls: on a CPU the check is enough, and another takes seconds."""
COMPILES = DEVICE == "cuda" or environment.cpu_bf16() is not None
NOT_COMPILED = (
    "compiling takes a minute and gains nothing in fp32 on a CPU without bf16 products "
    "(docs/decisions/0009-cpu-step.md)"
)
FP32_COMPILED = "on a GPU compiled rows are of the dtype of training: each compiles for long"
NO_KERNELS = "Triton's kernels are for GPUs; on a CPU the reference runs"
NO_TWIN = "its reference wasn't measured, so it can't be compared"
RECOMPILES = 64
"""Graphs that a function may have; by default it runs eagerly beyond the eighth, without a word."""
MINUTES_VARIABLE = "FASTBEIT_BENCH_MINUTES"
MINUTES = {"cpu": 8.0, "cuda": 9.0}
"""After which a session begins no other benchmark, unless the environment variable says otherwise:
the whole run is to take ten."""
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class Session:
    """``deadline_s``: by ``time.monotonic``, when no other benchmark is begun."""

    deadline_s: float = math.inf


SESSION = Session()


def begin_session(began_s: float) -> None:
    """Set the deadline of a session that began at ``began_s``.

    Raises:
        ValueError: the environment variable is no number of minutes.
    """
    given = os.environ.get(MINUTES_VARIABLE, "")
    try:
        minutes = float(given) if given else MINUTES[DEVICE]
    except ValueError:
        minutes = math.nan
    if not minutes > 0:
        raise ValueError(f"{MINUTES_VARIABLE} must be a number of minutes above 0, got {given!r}")
    SESSION.deadline_s = began_s + 60 * minutes


def name_row(benchmark: Any, about: dict[str, Any], sizes: dict[str, Any]) -> None:
    """What tells the row apart, said before anything can go wrong: a missing row has it too.
    ``missing`` where the session's time is up."""
    benchmark.extra_info.update(about, sizes=sizes)
    if not benchmark.disabled and time.monotonic() > SESSION.deadline_s:
        missing(f"out of time ({MINUTES_VARIABLE} gives a session more)")


def begin_compiling() -> AbstractContextManager[None]:
    """Nothing compiled before is kept, and what is compiled too often fails.

    A function's graphs are limited, and all tests share the functions: rows of later tests would be
    eager ones by the name of compiled ones.
    """
    if not COMPILES and "torch._dynamo" not in sys.modules:
        return nullcontext()  # its import takes seconds
    import torch._dynamo

    torch._dynamo.reset()
    return torch._dynamo.config.patch(recompile_limit=RECOMPILES, fail_on_recompile_limit_hit=True)


def free_memory() -> None:
    """Give back what tests before kept of the device's."""
    if DEVICE == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def measure(
    benchmark: Any,
    run: Callable[[], object],
    *,
    suite: str,
    part: str,
    path: str,
    check: Callable[[], None] | None = None,
    check_watched: Callable[[], None] | None = None,
    beside: Callable[[], object] | None = None,
    images: int = 0,
    work: Work | None = None,
    dtype: str = "float32",
    rounds: int = 5,
    warmup: int = 1,
    **sizes: Any,
) -> None:
    """Check, then time ``run``, and fill ``benchmark.extra_info``.

    Args:
        run: one call of the work. On a GPU the clock stops when the device is done.
        suite, part, path: what is measured, which piece of it, and by whom ("reference", "fast",
            "official style", "timm, compiled", ...).
        check: compares with the twin before anything is timed; raises AssertionError.
        check_watched: a check that is part of the work whose peak memory is told, as a CUDA graph's
            capture is.
        beside: the twin's call, made after each sample and timed apart: the row then says its time
            over that neighbour's, which drifts of the machine cancel in. For calls of seconds.
        images: that one call handles; 0 where there are none.
        work: FLOPs and bytes that one call takes at least.
        dtype: of the products, by torch's name; the limit is of this dtype.
        rounds: samples. Calls under 20 ms are repeated in a sample, and sampled 11 times at least;
            on a GPU until the samples take half a second.
        warmup: calls before the first sample. With 0, nothing is repeated.
        sizes: what else tells the row apart: batch, width, tokens, workers, ...
    """
    about = {"suite": suite, "part": part, "path": path, "dtype": dtype}
    name_row(benchmark, about, sizes)
    if check is not None:
        check()
    call = run if DEVICE == "cpu" else functools.partial(_finished, run)
    if benchmark.disabled:  # the code is tried, nothing is measured
        if check_watched is not None:
            check_watched()
        benchmark.pedantic(call)
        return
    limit = None if work is None else ceiling(DEVICE, dtype)
    before = start_peak()
    if check_watched is not None:
        check_watched()
    taken_s = _warm_up(call, warmup)
    calls = _calls(taken_s)
    rounds = _rounds(rounds, calls, taken_s)
    if beside is None:
        benchmark.pedantic(call, rounds=rounds, iterations=calls)
        peak_bytes = end_peak(before)
    else:
        peak_bytes = _alternate(benchmark, call, beside, rounds, before)
    median_s = benchmark.stats.stats.median
    benchmark.extra_info.update(
        images=images,
        images_per_s=images / median_s if images else None,
        peak_bytes=peak_bytes,
        device=DEVICE if DEVICE == "cpu" else torch.cuda.get_device_name(),
        threads=torch.get_num_threads(),
        versions={name: version_of(name) for name in ("torch", "triton", "numpy")},
        commit=_commit(),
    )
    if work is not None and limit is not None:
        floor_ms = limit.floor_ms(work)
        benchmark.extra_info.update(
            flops=work.flops,
            bytes=work.bytes,
            tflops=work.flops / median_s / 1e12,
            tb_per_s=work.bytes / median_s / 1e12,
            floor_ms=floor_ms,
            fraction_of_limit=floor_ms / (1e3 * median_s),
        )


def missing(reason: str) -> NoReturn:
    """Skip, and keep a row that says why."""
    pytest.skip(reason)


def _finished(run: Callable[[], object]) -> None:
    run()
    torch.cuda.synchronize()


def _alternate(
    benchmark: Any,
    call: Callable[[], object],
    beside: Callable[[], object],
    rounds: int,
    before: int | None,
) -> int | None:
    """Time one and the other in turn; the first's peak memory."""
    peaks: list[int | None] = []
    twin_s: list[float] = []

    def turn() -> None:
        peaks.append(end_peak(before))  # of the first sample: the twin's own memory is in the next
        twin_s.append(_seconds(beside))

    benchmark.pedantic(call, rounds=rounds, teardown=turn)
    samples_s = benchmark.stats.stats.data
    benchmark.extra_info["over_reference"] = describe(
        [own_s / other_s for own_s, other_s in zip(samples_s, twin_s, strict=True)]
    )
    benchmark.extra_info["reference_ms"] = 1e3 * quantile(twin_s, 0.5)
    return peaks[0]


def describe(samples: Sequence[float]) -> dict[str, float]:
    """Their median and deciles."""
    return {
        "value": quantile(samples, 0.5),
        "p10": quantile(samples, 0.1),
        "p90": quantile(samples, 0.9),
        "n": len(samples),
    }


def _warm_up(call: Callable[[], object], times: int) -> list[float]:
    """Run it ``times`` times, or a few more where it is quick; the seconds of each."""
    taken_s = [_seconds(call) for _ in range(times)]
    if not taken_s or taken_s[-1] > 10 * ROUND_S:
        return taken_s
    # What a first call sets up can be most of its time: a few more tell.
    until_s = time.perf_counter() + ROUND_S
    while time.perf_counter() < until_s:
        taken_s.append(_seconds(call))
    return taken_s


def _calls(taken_s: list[float]) -> int:
    """How many calls a sample needs, by the quickest."""
    if not taken_s or taken_s[-1] > 10 * ROUND_S:
        return 1
    return max(1, min(10_000, math.ceil(ROUND_S / max(min(taken_s), 1e-9))))


def _rounds(asked: int, calls: int, taken_s: list[float]) -> int:
    """How many samples."""
    least = asked if calls == 1 else max(asked, QUICK_ROUNDS)
    if DEVICE == "cpu" or not taken_s:
        return least
    return max(least, math.ceil(GPU_SAMPLED_S / (calls * max(min(taken_s), 1e-9))))


def _seconds(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def start_peak() -> int | None:
    """Begin to watch the most memory in use: on a GPU torch's, else this process's.

    Returns where the process began, in bytes; None where the system doesn't tell (not Linux).
    """
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    with suppress(OSError, AttributeError):
        # What the allocator keeps of earlier work would be used again without showing.
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        CLEAR_REFS.write_text("5")  # the high-water mark falls to what is resident now
        return _status_bytes("VmRSS")
    return None


def end_peak(began: int | None) -> int | None:
    """The most bytes since `start_peak`: all of torch's on a GPU, above ``began`` on a CPU."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    most = _status_bytes("VmHWM")
    return None if began is None or most is None else max(0, most - began)


def _status_bytes(field: str) -> int | None:
    with suppress(OSError):
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return None


@functools.cache
def _commit() -> str | None:
    return commit()
