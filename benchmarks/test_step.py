"""A whole optimizer step of ViT-B, tokenizer included: ours, its reference, and those of others.

    pytest benchmarks/test_step.py --benchmark-only

All start from the same weights, images, masks and tokenizer; loss and gradient norm of the first
step are compared with the reference student's before anything is timed, and several steps of a
CUDA graph with those of the same step without. "fast" has what `auto` takes, "kernels" every kernel
of ours, shown to be ahead or not. Suite "levers" goes from the reference step to that lever by
lever; "batch sizes" takes whole steps of several sizes. What compiles for long comes last.

On a CPU every step runs in turn with the reference step (in fp32, whatever its own dtype), so that
each ratio is one of neighbours in time. On a GPU, whose memory the two may not share, the reference
is measured once more behind its twins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import Unavailable
from benchmarks.steps import expected, optimizer_steps
from benchmarks.steps.optimizer_steps import LEVERS, Levers, Step, up_to
from benchmarks.steps.problem import Problem, base_for, demo, emulated
from benchmarks.steps.step_paths import (
    PEERS,
    QUICK,
    build_step,
    levers_of,
    why_not,
    without_graph,
)
from benchmarks.suite import DEVICE, free_memory, measure, missing, name_row
from benchmarks.suite_rows import AGAIN, REFERENCE
from fastbeit.training import trace
from fastbeit.training.distributed import World
from fastbeit.training.graph import WARM_UPS

FIRST, SECOND = ("float32", "bfloat16") if DEVICE == "cpu" else ("bfloat16", "float32")
"""On a GPU the dtype of training first: a run may be cut short."""


BEHIND = (AGAIN,) if DEVICE == "cuda" else ()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with optimizer_steps.one_process() as found:
        yield found
    yardstick.cache_clear()


@functools.cache
def yardstick(problem: Problem, world: World) -> Step:
    """The reference step that others run in turn with, warmed up."""
    step = optimizer_steps.ours(problem, world, getattr(torch, FIRST), Levers())
    step()
    return step


SAME_STEP = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
"""Relative: a replay runs the kernels of the eager step, whose atomic sums have no order."""
COMPARED = WARM_UPS + 3
"""Steps of a graph that are compared: three of them are replays."""


def taken(step: Step, count: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of the next steps."""
    return [(loss.item(), norm.item()) for loss, norm in (step() for _ in range(count))]


def assert_same_steps(
    found: list[tuple[float, float]], wanted: list[tuple[float, float]], dtype: torch.dtype
) -> None:
    """Every loss and every norm."""
    for place, (ours, theirs) in enumerate(zip(found, wanted, strict=True), start=1):
        gap = max(abs(one / other - 1) for one, other in zip(ours, theirs, strict=True))
        assert gap <= SAME_STEP[dtype], (
            f"step {place} of those compared: {ours} with a graph, {theirs} without, {gap:.1e} off"
        )


def assert_first_step(step: Step, problem: Problem, dtype: torch.dtype) -> None:
    """Loss and gradient norm of the first step are those of the reference student in fp32."""
    wanted, allowed = expected.numbers(problem, DEVICE), expected.TOLERANCES[dtype]
    loss, norm = (value.item() for value in step())
    assert abs(loss / wanted.loss - 1) <= allowed, f"loss {loss}, expected {wanted.loss}"
    assert abs(norm / wanted.gradient_norm - 1) <= allowed, (
        f"gradient norm {norm}, expected {wanted.gradient_norm}"
    )


def time_step(
    benchmark: Any,
    build: Callable[[torch.dtype], Step],
    problem: Problem,
    world: World,
    *,
    dtype: str,
    warmup: int = 0,
    rounds: int = 2,
    suite: str,
    part: str,
    path: str,
    eager: Callable[[torch.dtype], Step] | None = None,
) -> Step:
    """Build, check by the first step, time those that follow.

    ``eager``: builds the same without a CUDA graph, to compare a replay with; None where there is
    no graph.
    """
    about = {"suite": suite, "part": part, "path": path, "dtype": dtype}
    name_row(benchmark, about, problem.sizes)
    precision = getattr(torch, dtype)
    if (reason := emulated(DEVICE, precision)) is not None:
        missing(reason)
    wanted: list[tuple[float, float]] = []
    if eager is not None:  # and let go of: the two at once may not fit
        wanted = taken(eager(precision), COMPARED)
        free_memory()
    try:
        step = build(precision)
    except Unavailable as error:
        missing(str(error))

    def replays() -> None:
        """From the second step on; the capture is among them, and its memory is the step's."""
        assert_same_steps(taken(step, COMPARED - 1), wanted[1:], precision)

    alone = DEVICE == "cuda" or benchmark.disabled or (path, dtype) == (REFERENCE, FIRST)
    measure(
        benchmark,
        step,
        **about,
        beside=None if alone else yardstick(problem, world),
        check=lambda: assert_first_step(step, problem, precision),
        check_watched=replays if eager is not None else None,
        images=problem.batch,
        work=problem.step_work(precision),
        rounds=rounds,
        warmup=warmup,
        **problem.sizes,
    )
    return step


def time_path(
    benchmark: Any, world: World, problem: Problem, path: str, dtype: str, suite: str, **more: int
) -> None:
    """A path by its name. The kernels' row says why where there are none."""
    levers = None if DEVICE == "cpu" else levers_of(path)
    time_step(
        benchmark,
        lambda precision: build_step(path, problem, world, precision),
        problem,
        world,
        dtype=dtype,
        suite=suite,
        part="optimizer step",
        path=path,
        eager=without_graph(problem, world, levers),
        **more,
    )


@pytest.mark.parametrize("dtype", [FIRST])
@pytest.mark.parametrize("path", [*QUICK, *BEHIND])
def test_step(benchmark: Any, world: World, path: str, dtype: str) -> None:
    """Tokens, forward, backward, clip, AdamW."""
    time_path(benchmark, world, base_for(DEVICE), path, dtype, "step", warmup=warm_ups(path))


def warm_ups(path: str) -> int:
    """Of a whole step of ViT-B. On a CPU the checked one is enough."""
    return 0 if DEVICE == "cpu" else optimizer_steps.warm_ups(levers_of(path) or Levers())


@pytest.mark.parametrize("lever", [REFERENCE, *LEVERS, *BEHIND])
def test_levers(benchmark: Any, world: World, lever: str) -> None:
    """One lever after another stays pulled; first and last also under the profiler, by parts."""
    problem = base_for(DEVICE)
    levers = up_to(lever) if lever in LEVERS else Levers()
    # What a graph replays has no phase that a profiler could count it to.
    had = [name for name in LEVERS if why_not(name) is None and name != "graph"]
    reason = why_not(lever)

    def build(dtype: torch.dtype) -> Step:
        if reason is not None:
            missing(reason)
        return optimizer_steps.ours(problem, world, dtype, levers)

    step = time_step(
        benchmark,
        build,
        problem,
        world,
        dtype=FIRST,
        warmup=0 if DEVICE == "cpu" else optimizer_steps.warm_ups(levers),
        suite="levers",
        part="optimizer step",
        path=LEVERS.get(lever, lever),
        eager=without_graph(problem, world, levers) if reason is None else None,
    )
    if not benchmark.disabled and lever in (REFERENCE, had[-1]):
        benchmark.extra_info["parts"] = parts_of(step)


def parts_of(step: Step) -> list[dict[str, Any]]:
    """Shares of one step's time by phase and kind of work, as `fastbeit.profile` divides it."""
    activities = [ProfilerActivity.CPU]
    if DEVICE == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    events: Any = profiler.events() or []
    times = trace.time_by_part(events, on_gpu=DEVICE == "cuda")
    rows = trace.rows(times, 1, {}, {})
    return [
        {"phase": row.phase, "part": row.part, "ms": row.ms, "share": row.share} for row in rows
    ]


BATCHES = (4, 16, 64) if DEVICE == "cpu" else (16, 32, 64, 128, 256)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("path", [REFERENCE, "fast", "kernels"])
def test_batch_sizes(benchmark: Any, world: World, path: str, batch: int) -> None:
    """Images a second and memory over the batch: the demo's model on a CPU, ViT-B on a GPU."""
    problem = replace(demo() if DEVICE == "cpu" else base_for(DEVICE), batch=batch)
    time_path(
        benchmark,
        world,
        problem,
        path,
        FIRST,
        "batch sizes",
        warmup=1 if DEVICE == "cpu" else warm_ups(path),
        rounds=3 if DEVICE == "cpu" else 10,
    )


@pytest.mark.parametrize("dtype", [FIRST])
@pytest.mark.parametrize("path", PEERS)
def test_peers(benchmark: Any, world: World, path: str, dtype: str) -> None:
    """The step with others' students."""
    test_step(benchmark, world, path, dtype)


@pytest.mark.parametrize("dtype", [SECOND])
@pytest.mark.parametrize("path", [*QUICK, *PEERS])
def test_other_dtype(benchmark: Any, world: World, path: str, dtype: str) -> None:
    """The step in the dtype that this machine is not trained in."""
    test_step(benchmark, world, path, dtype)
