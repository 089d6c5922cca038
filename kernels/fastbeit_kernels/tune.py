"""Measure launch choices on the GPU at hand and print new entries for ``_configs.py``.

    python -m fastbeit_kernels.tune                          # bf16, heads of 64, BEiT-B's shape
    python -m fastbeit_kernels.tune --dtype bf16,fp32 --width 128
    python -m fastbeit_kernels.tune --list --arch sm_90      # what would be timed; needs no GPU

For each kernel: every tile that could fit is compiled on all cores, dropped if the compile report
has something against it (spills, a tile computed twice, too much shared memory), compared with the
frozen choice's results, and timed beside it. The best of each kernel, then the number of programs
that the dK/dV kernel is cut into, make the entry. Nothing is changed: paste it if it is better.

Exit codes: 0 done, 2 where there is no GPU to measure on, or no Triton.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import TYPE_CHECKING

import torch

from .inspect import DTYPES, why_not

if TYPE_CHECKING:
    from ._tune.search import Machine


def this_machine() -> Machine:
    from ._configs import family_of
    from ._inspect.targets import TARGETS
    from ._tune.search import Machine

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
    from ._inspect.targets import target_of
    from ._launches.attention import TRAINING
    from ._tune.search import entry, list_candidates, say, tune, versions

    heads = TRAINING[0].heads * 64 // options.width
    shape = dataclasses.replace(TRAINING[0], heads=heads, width=options.width)
    dtypes = [getattr(torch, DTYPES[name]) for name in options.dtype.split(",")]
    if options.list:
        try:
            target_of(options.arch)
        except ValueError as error:
            parser.error(str(error))
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
