"""The search for the fastest configuration of one shape: what ``tune.py`` runs on a GPU."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .._configs import AttentionConfig, Tile
from .._launches.attention import Shape
from .candidates import (
    PARTS,
    PROGRAMS_PER_SM,
    Compiler,
    Job,
    Problem,
    compile_jobs,
    launches_of,
    make_problem,
    tiles,
    with_tile,
)
from .timing import Timer, Timing, time_on_gpu

# Two input sets of BEiT-B at batch 128 are larger than the L2 of any GPU there is.
INPUT_SETS = 2
RESULTS = {"forward": ("out",), "whole_row": ("out",), "queries": ("dq",), "keys": ("dk", "dv")}
# Candidates sum in another order: a few roundings of the largest element apart, not more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2**-7, torch.bfloat16: 2**-5}


@dataclass(frozen=True)
class Machine:
    """The GPU that is tuned on."""

    name: str
    arch: str
    family: str
    multiprocessors: int


def say(line: str) -> None:
    print(line, flush=True)


def survivors(jobs: list[Job], compiler: Compiler, workers: int) -> list[Tile | None]:
    """Tiles that nothing speaks against; says what became of the others."""
    kept = []
    for job, against in compiler(jobs, workers):
        if against:
            say(f"  {show(job.tile)}: {against[0]}")
        else:
            kept.append(job.tile)
    say(f"  {len(kept)} of {len(jobs)} candidates are left")
    return kept


def show(tile: Tile | None) -> str:
    if tile is None:
        return "None"
    cap = "" if tile.maxnreg is None else f", {tile.maxnreg}"
    return f"Tile({tile.rows}, {tile.columns}, {tile.warps}, {tile.stages}{cap})"


def results(part: str, problem: Problem, config: AttentionConfig) -> list[Tensor]:
    """What a part computes under a configuration, copied."""
    launches = launches_of(part, problem, config)
    found = [getattr(problem, name) for name in RESULTS[part]]
    for tensor in found:
        tensor.fill_(float("nan"))
    for launch in launches:
        launch.run()
    copies = [tensor.clone() for tensor in found]
    if part == "keys":
        name = "dbias_ptr"
        copies.append(launches[-1].arguments[name].sum(0).clone())
    return copies


def agree(found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> bool:
    for mine, theirs in zip(found, wanted, strict=True):
        largest = theirs.float().abs().max()
        # Written so that a NaN is a disagreement.
        if not bool((mine.float() - theirs.float()).abs().max() <= TOLERANCE[dtype] * largest):
            return False
    return True


def measure(
    part: str,
    problems: list[Problem],
    configs: list[AttentionConfig],
    timer: Timer,
    seconds: float,
) -> list[Timing]:
    contestants = []
    for config in configs:
        launches = [launches_of(part, problem, config) for problem in problems]
        contestants.append([partial(run_all, one) for one in launches])
    return timer(contestants, seconds)


def run_all(launches: Sequence[object]) -> None:
    for launch in launches:
        launch.run()  # pyright: ignore[reportAttributeAccessIssue]


def tune(
    machine: Machine,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    *,
    seconds: float,
    workers: int,
    timer: Timer = time_on_gpu,
    compiler: Compiler = compile_jobs,
) -> AttentionConfig:
    """The fastest configuration for one shape and dtype; prints all that was measured."""
    bits = dtype.itemsize * 8
    width = max(64, 1 << (shape.width - 1).bit_length())
    problems = [make_problem(shape, dtype, device, seed) for seed in range(INPUT_SETS)]
    first = Job(
        machine.arch, "forward", shape, dtype, tiles("forward", machine.family, bits, width)[0]
    )
    config = first.config()
    measured: dict[str, float] = {}
    for part in PARTS:
        candidates = tiles(part, machine.family, bits, width)
        if len(candidates) == 1:
            continue
        say(f"{part}, {dtype}, {shape.model}: compiling")
        jobs = [Job(machine.arch, part, shape, dtype, tile) for tile in candidates]
        wanted = [results(part, problem, config) for problem in problems]
        kept = []
        for tile in survivors(jobs, compiler, workers):
            found = results(part, problems[0], with_tile(config, part, tile))
            if agree(found, wanted[0], dtype):
                kept.append(with_tile(config, part, tile))
            else:
                say(f"  {show(tile)}: WRONG, its results are not those of the frozen choice")
        if not kept:
            say(f"  nothing to time; {part} stays as it is")
            continue
        config, measured[part] = fastest(part, problems, kept, timer, seconds)
        if part == "keys":
            counts = [count * machine.multiprocessors for count in PROGRAMS_PER_SM]
            counts = sorted({*counts, config.key_programs})
            programs = [dataclasses.replace(config, key_programs=count) for count in counts]
            config, measured[part] = fastest(part, problems, programs, timer, seconds)
        # What later parts read (log-sum-exp, delta) comes from the choices made so far.
        for problem in problems:
            run_all(launches_of(part, problem, config))
    times = ", ".join(f"{part} {ms:.4f} ms" for part, ms in measured.items())
    source = f"{times} at {shape.batch}x{shape.heads}x{shape.keys}, {machine.name}, {versions()}"
    return dataclasses.replace(config, source=source)


def fastest(
    part: str,
    problems: list[Problem],
    configs: list[AttentionConfig],
    timer: Timer,
    seconds: float,
) -> tuple[AttentionConfig, float]:
    timings = measure(part, problems, configs, timer, seconds)
    ranked = sorted(zip(timings, configs, strict=True), key=lambda pair: pair[0].ms)
    for timing, config in ranked:
        programs = f", {config.key_programs} programs" if part == "keys" else ""
        spread = f"{timing.low_ms:.4f} to {timing.high_ms:.4f}, n={timing.n}"
        say(f"  {timing.ms:.4f} ms ({spread})  {show(getattr(config, part))}{programs}")
    return ranked[0][1], ranked[0][0].ms


def versions() -> str:
    import triton

    today = datetime.date.today().isoformat()
    return f"{today}, Triton {triton.__version__}, torch {torch.__version__}"


def entry(family: str, bits: int, width: int, config: AttentionConfig) -> str:
    """Lines of Python for ``_configs.ATTENTION``."""
    numbers = ", ".join(show(tile) for tile in (config.forward, config.queries, config.keys))
    rows = "" if config.whole_row is None else f"        whole_row={show(config.whole_row)},\n"
    return (
        f'    ("{family}", {bits}, {width}): AttentionConfig(\n'
        f"        {numbers}, {config.key_programs},\n"
        f"        {config.source!r},\n{rows}"
        "    ),  # fmt: skip"
    )


def list_candidates(arch: str, shape: Shape, dtype: torch.dtype, workers: int) -> None:
    from .._inspect.targets import target_of

    family, bits = target_of(arch).family, dtype.itemsize * 8
    width = max(64, 1 << (shape.width - 1).bit_length())
    for part in PARTS:
        say(f"{part}, {dtype}, {arch}:")
        jobs = [Job(arch, part, shape, dtype, tile) for tile in tiles(part, family, bits, width)]
        for tile in survivors(jobs, compile_jobs, workers):
            say(f"  {show(tile)}")
