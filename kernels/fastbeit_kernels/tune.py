"""Measure launch choices on the GPU at hand and print new entries for ``_configs.py``.

    python -m fastbeit_kernels.tune                          # bf16, heads of 64, BEiT-B's shape
    python -m fastbeit_kernels.tune --dtype bf16,fp32 --width 128
    python -m fastbeit_kernels.tune --list --arch sm_90      # what would be timed; needs no GPU

For each kernel: every tile that could fit is compiled on all cores, dropped if the compile report
has something against it (spills, a tile computed twice, too much shared memory), compared with the
frozen choice's results, and timed beside it. The best of each kernel, then the number of programs
that the dK/dV kernel is cut into, make the entry. Nothing is changed: paste it if it is better.

Exit codes: 0 done, 2 where there is no GPU to measure on.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ._configs import AttentionConfig, Tile
from ._launches.attention import TRAINING, Shape
from ._tune.candidates import (
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
from ._tune.timing import Timer, Timing, time_on_gpu
from .inspect import DTYPES, why_not

# Two input sets of BEiT-B at batch 128 are larger than the L2 of any GPU there is.
INPUT_SETS = 2
RESULTS = {"forward": ("out",), "queries": ("dq",), "keys": ("dk", "dv")}
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


def survivors(jobs: list[Job], compiler: Compiler, workers: int) -> list[Tile]:
    """Tiles that nothing speaks against; says what became of the others."""
    kept = []
    for job, against in compiler(jobs, workers):
        if against:
            say(f"  {show(job.tile)}: {against[0]}")
        else:
            kept.append(job.tile)
    say(f"  {len(kept)} of {len(jobs)} candidates are left")
    return kept


def show(tile: Tile) -> str:
    return f"Tile({tile.rows}, {tile.columns}, {tile.warps}, {tile.stages})"


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
        say(f"{part}, {dtype}, {shape.model}: compiling")
        jobs = [
            Job(machine.arch, part, shape, dtype, tile)
            for tile in tiles(part, machine.family, bits, width)
        ]
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
    numbers = ", ".join(show(getattr(config, part)) for part in PARTS)
    return (
        f'    ("{family}", {bits}, {width}): AttentionConfig(\n'
        f"        {numbers}, {config.key_programs},\n"
        f"        {config.source!r},\n"
        "    ),  # fmt: skip"
    )


def list_candidates(arch: str, shape: Shape, dtype: torch.dtype, workers: int) -> None:
    from ._inspect.targets import target_of

    family, bits = target_of(arch).family, dtype.itemsize * 8
    width = max(64, 1 << (shape.width - 1).bit_length())
    for part in PARTS:
        say(f"{part}, {dtype}, {arch}:")
        jobs = [Job(arch, part, shape, dtype, tile) for tile in tiles(part, family, bits, width)]
        for tile in survivors(jobs, compile_jobs, workers):
            say(f"  {show(tile)}")


def this_machine() -> Machine:
    from ._configs import family_of
    from ._inspect.targets import TARGETS

    capability = torch.cuda.get_device_capability()
    family = family_of(capability)
    arch = f"sm_{capability[0]}{capability[1]}"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # A capability without limits of its own is pruned by those of its family.
    known = arch if arch in TARGETS else family
    return Machine(properties.name, known, family, properties.multi_processor_count)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastbeit_kernels.tune",
        description="Measure launch choices on this GPU and print entries for _configs.py.",
    )
    parser.add_argument("--dtype", default="bf16", help="of bf16, fp16, fp32; default bf16")
    parser.add_argument("--width", type=int, default=64, choices=(64, 128), help="of a head")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each kernel")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="compile candidates, time nothing")
    parser.add_argument("--arch", default="sm_90", help="for --list; default sm_90")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.dtype.split(",")) - set(DTYPES))
    if unknown:
        parser.error(f"--dtype must be of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    if reason := why_not():
        print(f"tune: {reason}", file=sys.stderr)
        return 2
    heads = TRAINING[0].heads * 64 // options.width
    shape = dataclasses.replace(TRAINING[0], heads=heads, width=options.width)
    dtypes = [getattr(torch, DTYPES[name]) for name in options.dtype.split(",")]
    if options.list:
        for dtype in dtypes:
            list_candidates(options.arch, shape, dtype, options.workers)
        return 0
    if not torch.cuda.is_available():
        print(
            "tune: there is no GPU to measure on. --list shows what would be timed, and "
            "python -m fastbeit_kernels.inspect what the kernels compile to.",
            file=sys.stderr,
        )
        return 2
    machine = this_machine()
    say(f"{machine.name}, {machine.arch}, {versions()}")
    for dtype in dtypes:
        config = tune(
            machine, shape, dtype, "cuda", seconds=options.seconds, workers=options.workers
        )
        say(entry(machine.family, dtype.itemsize * 8, options.width, config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
