"""Paths of the step's suites by name: which levers each pulls on this machine, and why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.steps import optimizer_steps, students
from benchmarks.steps.optimizer_steps import LEVERS, Levers, Step, best_of_others
from benchmarks.steps.problem import Problem
from benchmarks.suite import COMPILES, DEVICE, FP32_COMPILED, NO_KERNELS, NOT_COMPILED, missing
from benchmarks.suite_rows import AGAIN, REFERENCE
from fastbeit.training.distributed import World

Build = Callable[[Problem, World, torch.dtype], Step]
GRAPH_ALONE = "CUDA graphs are captured on a GPU"


def why_not(lever: str) -> str | None:
    """Why a lever can't be pulled, or is none, on this machine."""
    reasons = {
        "half_tokenizer": "the student is in fp32 on a CPU, as its tokenizer",
        "attention": NO_KERNELS,
        "kernels": NO_KERNELS,
        "compiled": None if COMPILES else NOT_COMPILED,
        "graph": GRAPH_ALONE,
    }
    return reasons.get(lever) if DEVICE == "cpu" else None


def all_levers() -> Levers:
    """Every lever that this machine has, but kernels only as far as `auto` takes them."""
    pulled = [name for name in LEVERS if why_not(name) is None]
    named = dict.fromkeys(("attention", "kernels"), False)
    return replace(Levers(), **(dict.fromkeys(pulled, True) | named), auto=True)


def with_kernels() -> Levers:
    """The same with every kernel by name: what a GPU is to say is whether `auto` may take them."""
    if DEVICE == "cpu":
        missing(NO_KERNELS)
    return replace(all_levers(), attention=True, kernels=True, auto=False)


def levers_of(path: str) -> Levers | None:
    """Of our own paths; None of others'."""
    if path == "fast":
        return all_levers()
    if path == "kernels":
        return with_kernels()
    return Levers() if path in (REFERENCE, AGAIN) else None


def without_graph(
    problem: Problem, world: World, levers: Levers | None
) -> Callable[[torch.dtype], Step] | None:
    """Builds the eager twin of a step with a CUDA graph; None where it has none."""
    if levers is None or not levers.graph:
        return None
    return lambda dtype: optimizer_steps.ours(problem, world, dtype, replace(levers, graph=False))


def official_style(problem: Problem, world: World, dtype: torch.dtype) -> Step:
    student = students.official_style(problem, world.device, dtype)
    return optimizer_steps.official_style(problem, student, world.device)


def transformers(problem: Problem, world: World, dtype: torch.dtype) -> Step:
    student = students.transformers(problem, world.device, dtype)
    return best_of_others(problem, student, world.device, dtype)


def transformers_compiled(problem: Problem, world: World, dtype: torch.dtype) -> Step:
    student = students.transformers_compiled(problem, world.device, dtype)
    return best_of_others(problem, student, world.device, dtype)


def timm_compiled(problem: Problem, world: World, dtype: torch.dtype) -> Step:
    student = students.timm_compiled(problem, world.device, dtype)
    return best_of_others(problem, student, world.device, dtype)


# Before the levers what is quick, behind them what compiles for long.
QUICK = (REFERENCE, "fast", "kernels", "official style")
PEERS: dict[str, Build] = {
    "transformers, sdpa": transformers,
    "transformers, sdpa, compiled": transformers_compiled,
    "timm, compiled": timm_compiled,
}


def build_step(path: str, problem: Problem, world: World, dtype: torch.dtype) -> Step:
    """The row is missing where this machine hasn't got that path."""
    if path.endswith("compiled") and not COMPILES:
        missing(NOT_COMPILED)
    if path.endswith("compiled") and DEVICE == "cuda" and dtype == torch.float32:
        missing(FP32_COMPILED)
    levers = levers_of(path)
    if levers is not None:
        return optimizer_steps.ours(problem, world, dtype, levers)
    build = official_style if path in QUICK else PEERS[path]
    return build(problem, world, dtype)
