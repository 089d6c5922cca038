"""Compile report: every kernel that training launches, compiled for GPUs that need not be there.

    python -m fastbeit_kernels.inspect --arch sm_80,sm_90,sm_100
    python -m fastbeit_kernels.inspect --arch sm_90 --dtype bf16 --match "BEiT-B, 197" --json FILE

For each launch of ``_launches.py`` and each target: registers, stack, spills, shared memory, blocks
a multiprocessor holds, barriers, tensor-core instructions, bytes of a load, FLOPs and bytes counted
from the shapes, and the floor on the time that these give on one GPU. Nothing is run, so nothing is
measured. The exit code is 1 if a kernel breaks a rule (``_inspect/rules.py``): spills, a tile that
is computed twice, 16-bit products without tensor cores, fp32 rounded to tf32, narrow loads, too
much shared memory, or the transposed product that Triton up to 3.7.0 miscompiles; 2 if nothing can
be compiled.

Another Triton than the installed one, without changing the environment:

    pip install --no-deps --target OTHER triton==3.6.0
    PYTHONPATH=OTHER python -m fastbeit_kernels.inspect --arch sm_80,sm_90,sm_100

``TRITON_INTERPRET`` must be unset: Triton can't compile what it defines for its interpreter.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._inspect.compiled import Compiled
    from ._inspect.report import Row
    from ._launches import Record

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DEFAULT_ARCH = "sm_80,sm_90,sm_100"


def why_not() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        return "TRITON_INTERPRET is set, and Triton can't compile then; unset it"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed; pip install triton"
    return None


def compile_one(arch: str, number: int) -> Compiled:
    """The launch of that number on that target; what a worker does."""
    from ._inspect.compiled import compile_source
    from ._inspect.targets import target_of
    from ._launches import launches

    target = target_of(arch)
    record = launches(target.family)[number]
    return compile_source(record.source_arguments(), record.launch.options(), target)[0]


def same_code(record: Record) -> str:
    """Equal for launches that compile to the same code on one target."""
    source = record.source_arguments()
    parts = (source["signature"], source["constexprs"], source["attrs"])
    return repr((record.launch.kernel.__name__, parts, record.launch.options()))


def report(
    archs: Iterable[str],
    dtypes: Iterable[str] = tuple(DTYPES.values()),
    match: str = "",
    workers: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Compile and read every chosen launch, each piece of code once.

    Args:
        archs: ``"sm_90"`` ...
        dtypes: names of torch dtypes. Kernels that float32 alone has (the table's, sums of
            gradients' parts) serve every dtype and are always there.
        match: regular expression searched for in the launch's name.
        workers: processes; by default one a CPU core, four at most.
    """
    from . import _configs
    from ._inspect.report import Row
    from ._inspect.targets import target_of
    from ._launches import launches

    # Launches that can't fit a target, and what runs instead: {(family, dtype, name): words}.
    fallbacks: dict[tuple[str, str, str], str] = getattr(_configs, "FALLBACKS", {})
    chosen: list[tuple[str, int, Record]] = []
    firsts: dict[tuple[str, str], tuple[str, int]] = {}
    for arch in archs:
        records = launches(target_of(arch).family)
        halves = {r.launch.kernel.__name__ for r in records if r.dtype != "float32"}
        for number, record in enumerate(records):
            serves = record.dtype in dtypes or record.launch.kernel.__name__ not in halves
            if serves and re.search(match, record.name):
                chosen.append((arch, number, record))
                firsts.setdefault((arch, same_code(record)), (arch, number))
    workers = workers or min(4, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    results = {}
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {key: pool.submit(compile_one, *job) for key, job in firsts.items()}
        for done, (key, future) in enumerate(futures.items(), 1):
            results[key] = future.result()
            progress(f"{done} of {len(futures)} compiled")
    rows = []
    shown = set()
    for arch, _, record in chosen:
        # The sum of dBias is the same launch for bf16 and fp16.
        numbers = (record.flops, record.padded_flops, record.hbm_bytes, record.l2_bytes)
        label = (arch, record.dtype, record.name, same_code(record), record.launch.grid, numbers)
        if label in shown:
            continue
        shown.add(label)
        fallback = fallbacks.get((target_of(arch).family, record.dtype, record.name))
        compiled = results[arch, same_code(record)]
        rows.append(Row(target_of(arch), record, compiled, fallback))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastbeit_kernels.inspect",
        description="Compile the kernels for GPUs that need not be there and report what came out.",
    )
    parser.add_argument("--arch", default=DEFAULT_ARCH, help=f"default {DEFAULT_ARCH}")
    parser.add_argument("--dtype", default=",".join(DTYPES), help="of bf16, fp16, fp32; all")
    parser.add_argument("--match", default="", help="regular expression for the launches' names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was read")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--workers", type=int, help="processes; default: cores, 4 at most")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.dtype.split(",")) - set(DTYPES))
    if unknown:
        parser.error(f"--dtype must be of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    if reason := why_not():
        print(f"inspect: {reason}", file=sys.stderr)
        return 2
    import triton

    from ._inspect.report import markdown, text_table, to_json
    from ._inspect.targets import target_of

    archs = options.arch.split(",")
    try:
        for arch in archs:
            target_of(arch)
    except ValueError as error:
        parser.error(str(error))

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{line}", end="", file=sys.stderr, flush=True)

    dtypes = [DTYPES[name] for name in options.dtype.split(",")]
    rows = report(archs, dtypes, options.match, options.workers, progress)
    if not rows:
        print(f"inspect: no launch matches {options.match!r} in {options.dtype}", file=sys.stderr)
        return 2
    print(f"Triton {triton.__version__}: compiled, not measured.\n")
    print(text_table(rows))
    if options.json:
        options.json.write_text(to_json(rows, triton.__version__), encoding="utf-8")
    if options.markdown:
        command = f"python -m fastbeit_kernels.inspect --arch {options.arch} --markdown FILE"
        text = markdown(rows, triton.__version__, command)
        options.markdown.write_text(text, encoding="utf-8")
    broken = sum(bool(row.breaches) for row in rows)
    if broken:
        print(f"\n{broken} of {len(rows)} launches break a rule.", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
