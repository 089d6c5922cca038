"""What every suite calls: compare with the twin, time, say how far from the machine's limit.

    def test_step(benchmark):
        measure(benchmark, run, suite="step", part="student", path="fast", check=compare,
                images=8, work=Work(flops, bytes), batch=8)

A row is told apart by (suite, part, path, dtype, sizes). Its twin is the row of the same suite,
part and sizes whose path is "reference" (of the same dtype where there are several): the report and
the regression check compare with that. A peer that can't run here is ``missing(reason)``.
`benchmarks.recorder` writes the rows; pytest-benchmark's own JSON has the same in ``extra_info``.
Suites that the report draws by name: "loader", "step", "levers", "batch sizes", "step parts".
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from benchmarks.ceilings import ceiling
from benchmarks.gpu.environment import commit, version_of
from benchmarks.roofline import Work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUND_S = 0.02
"""A sample repeats a quick call until it lasts this long: below, the clock is what's timed."""
QUICK_ROUNDS = 11
"""Samples of a quick call at least: they take a quarter of a second, and settle the median."""
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def measure(
    benchmark: Any,
    run: Callable[[], object],
    *,
    suite: str,
    part: str,
    path: str,
    check: Callable[[], None] | None = None,
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
        images: that one call handles; 0 where there are none.
        work: FLOPs and bytes that one call takes at least.
        dtype: of the products, by torch's name; the limit is of this dtype.
        rounds: samples. Calls under 20 ms are repeated in a sample, and sampled 11 times at least.
        warmup: calls before the first sample. With 0, nothing is repeated.
        sizes: what else tells the row apart: batch, width, tokens, workers, ...
    """
    about = {"suite": suite, "part": part, "path": path, "sizes": sizes, "dtype": dtype}
    benchmark.extra_info.update(about)
    if check is not None:
        check()
    call = run if DEVICE == "cpu" else functools.partial(_finished, run)
    if benchmark.disabled:  # the code is tried, nothing is measured
        benchmark.pedantic(call)
        return
    limit = None if work is None else ceiling(DEVICE, dtype)
    before = start_peak()
    calls = _warm_up(call, warmup)
    rounds = rounds if calls == 1 else max(rounds, QUICK_ROUNDS)
    benchmark.pedantic(call, rounds=rounds, iterations=calls)
    peak_bytes = end_peak(before)
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


def _warm_up(call: Callable[[], object], times: int) -> int:
    """Run it ``times`` times; how many calls a sample needs, by the quickest."""
    taken_s = [_seconds(call) for _ in range(times)]
    if not taken_s or taken_s[-1] > 10 * ROUND_S:
        return 1
    # What a first call sets up can be most of its time: a few more tell.
    until_s = time.perf_counter() + ROUND_S
    while time.perf_counter() < until_s:
        taken_s.append(_seconds(call))
    return max(1, min(10_000, math.ceil(ROUND_S / max(min(taken_s), 1e-9))))


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
