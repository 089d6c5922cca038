"""A whole optimizer step of ViT-B, tokenizer included: ours, its reference, and those of others.

    pytest benchmarks/test_step.py --benchmark-only

All start from the same weights, images, masks and tokenizer; loss and gradient norm of the first
step are compared with the reference student's before anything is timed. Suite "levers" goes from
the reference step to the fast one lever by lever; "batch sizes" takes whole steps of several sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import Unavailable
from benchmarks.steps import expected, optimizer_steps, students
from benchmarks.steps.optimizer_steps import LEVERS, Levers, Step, best_of_others, up_to
from benchmarks.steps.problem import Problem, base_for, demo, emulated
from benchmarks.suite import DEVICE, measure, missing
from fastbeit import environment
from fastbeit.training import trace
from fastbeit.training.distributed import World
from fastbeit.training.graph import WARM_UPS

Build = Callable[[Problem, World, torch.dtype], Step]
DTYPES = ["float32", "bfloat16"]
COMPILES = DEVICE == "cuda" or environment.cpu_bf16() is not None
NOT_COMPILED = (
    "compiling takes a minute and gains nothing in fp32 on a CPU without bf16 products "
    "(docs/decisions/0009-cpu-step.md)"
)
GRAPH_ALONE = "CUDA graphs are captured on a GPU"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with optimizer_steps.one_process() as found:
        yield found


def why_not(lever: str) -> str | None:
    """Why a lever can't be pulled, or is none, on this machine."""
    on_gpus = "Triton's kernels are for GPUs; on a CPU the reference runs"
    reasons = {
        "half_tokenizer": "the student is in fp32 on a CPU, as its tokenizer",
        "attention": on_gpus,
        "kernels": on_gpus,
        "compiled": None if COMPILES else NOT_COMPILED,
        "graph": GRAPH_ALONE,
    }
    return reasons.get(lever) if DEVICE == "cpu" else None


def all_levers() -> Levers:
    """Every lever that this machine has, but kernels only as far as `auto` takes them."""
    pulled = [name for name in LEVERS if why_not(name) is None]
    named = dict.fromkeys(("attention", "kernels"), False)
    return replace(Levers(), **(dict.fromkeys(pulled, True) | named), auto=True)


def fast(problem: Problem, world: World, dtype: torch.dtype) -> Step:
    return optimizer_steps.ours(problem, world, dtype, all_levers())


def without_graph(
    problem: Problem, world: World, levers: Levers
) -> Callable[[torch.dtype], Step] | None:
    """Builds the eager twin of a step with a CUDA graph; None where it has none."""
    if not levers.graph:
        return None
    return lambda dtype: optimizer_steps.ours(problem, world, dtype, replace(levers, graph=False))


def reference(problem: Problem, world: World, dtype: torch.dtype) -> Step:
    return optimizer_steps.ours(problem, world, dtype, Levers())


def official_style(problem: Problem, world: World, dtype: torch.dtype) -> Step:
    student = students.official_style(problem, world.device, dtype)
    return optimizer_steps.official_style(problem, student, world.device)


def transformers(problem: Problem, world: World, dtype: torch.dtype) -> Step:
    student = students.transformers(problem, world.device, dtype)
    if COMPILES:
        student.module.compile()
    return best_of_others(problem, student, world.device, dtype)


def timm(problem: Problem, world: World, dtype: torch.dtype) -> Step:
    if not COMPILES:
        missing(NOT_COMPILED)
    student = students.timm_compiled(problem, world.device, dtype)
    return best_of_others(problem, student, world.device, dtype)


PATHS: dict[str, Build] = {
    "reference": reference,
    "fast": fast,
    "official style": official_style,
    "transformers, sdpa": transformers,
    "timm, compiled": timm,
}


def assert_replay(step: Step, eager: Step, dtype: torch.dtype) -> None:
    """A step that was called once finds, when it is replayed first, what an eager one does."""
    for _ in range(WARM_UPS):
        found = step()
    for _ in range(WARM_UPS + 1):
        wanted = eager()
    for ours, theirs in zip(found, wanted, strict=True):
        gap = abs(ours.item() / theirs.item() - 1)
        assert gap <= expected.TOLERANCES[dtype], f"a replay is {gap:.1e} off"


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
    about = {"suite": suite, "part": part, "path": path, "sizes": problem.sizes, "dtype": dtype}
    benchmark.extra_info.update(about)  # also of a row that is missing
    precision = getattr(torch, dtype)
    if (reason := emulated(DEVICE, precision)) is not None:
        missing(reason)
    try:
        step = build(precision)
    except Unavailable as error:
        missing(str(error))

    def check() -> None:
        assert_first_step(step, problem, precision)
        if eager is not None:
            assert_replay(step, eager(precision), precision)

    measure(
        benchmark,
        step,
        suite=suite,
        part=part,
        path=path,
        check=check,
        images=problem.batch,
        work=problem.step_work(),
        dtype=dtype,
        rounds=rounds,
        warmup=warmup,
        **problem.sizes,
    )
    return step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_step(benchmark: Any, world: World, path: str, dtype: str) -> None:
    """Tokens, forward, backward, clip, AdamW."""
    problem = base_for(DEVICE)
    time_step(
        benchmark,
        lambda precision: PATHS[path](problem, world, precision),
        problem,
        dtype=dtype,
        warmup=0 if DEVICE == "cpu" else optimizer_steps.warm_ups(all_levers()),
        suite="step",
        part="optimizer step",
        path=path,
        eager=without_graph(problem, world, all_levers()) if path == "fast" else None,
    )


@pytest.mark.parametrize("lever", ["reference", *LEVERS])
def test_levers(benchmark: Any, world: World, lever: str) -> None:
    """One lever after another stays pulled; first and last also under the profiler, by parts."""
    problem = base_for(DEVICE)
    levers = Levers() if lever == "reference" else up_to(lever)
    # What a graph replays has no phase that a profiler could count it to.
    had = [name for name in LEVERS if why_not(name) is None and name != "graph"]
    reason = None if lever == "reference" else why_not(lever)

    def build(dtype: torch.dtype) -> Step:
        if reason is not None:
            missing(reason)
        return optimizer_steps.ours(problem, world, dtype, levers)

    step = time_step(
        benchmark,
        build,
        problem,
        dtype="float32" if DEVICE == "cpu" else "bfloat16",
        warmup=0 if DEVICE == "cpu" else optimizer_steps.warm_ups(levers),
        suite="levers",
        part="optimizer step",
        path=LEVERS.get(lever, lever),
        eager=without_graph(problem, world, levers),
    )
    if not benchmark.disabled and lever in ("reference", had[-1]):
        benchmark.extra_info["parts"] = parts_of(step)


def parts_of(step: Step) -> list[dict[str, Any]]:
    """Shares of one step's time by phase and kind of work, as `fastbeit.profile` divides it."""
    activities = [ProfilerActivity.CPU]
    if DEVICE == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
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
@pytest.mark.parametrize("path", ["reference", "fast"])
def test_batch_sizes(benchmark: Any, world: World, path: str, batch: int) -> None:
    """Images a second and memory over the batch: the demo's model on a CPU, ViT-B on a GPU."""
    problem = replace(demo() if DEVICE == "cpu" else base_for(DEVICE), batch=batch)
    time_step(
        benchmark,
        lambda precision: PATHS[path](problem, world, precision),
        problem,
        dtype="float32" if DEVICE == "cpu" else "bfloat16",
        warmup=1 if DEVICE == "cpu" else optimizer_steps.warm_ups(all_levers()),
        rounds=3 if DEVICE == "cpu" else 10,
        suite="batch sizes",
        part="optimizer step",
        path=path,
    )
