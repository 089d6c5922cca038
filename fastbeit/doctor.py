"""Says what is installed, what will run and why, and looks over a data set.

    python -m fastbeit.doctor                      # this machine
    python -m fastbeit.doctor --data DIR           # and these images: count, formats, sizes, labels
    python -m fastbeit.doctor --data demo --split train --samples 500

Each line starts with ok, absent (not there, nothing wrong) or problem, and ends with what to do.

Exit codes: 0 fine; 1 a problem on this machine; 2 the data can't be trained on, whatever the
machine (and, as everywhere, wrong arguments).
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import arg

from fastbeit import __version__, environment, hardware
from fastbeit.environment import Finding

if TYPE_CHECKING:
    from fastbeit.data.source import Source

EXIT_OK, EXIT_MACHINE, EXIT_DATA = 0, 1, 2
MAX_BAD_SHOWN = 10
DEPENDENCIES = ("torch", "numpy", "pillow", "safetensors", "tyro", "rich", "matplotlib")


@dataclass(frozen=True)
class DoctorOptions:
    """What is installed, what will run and why; with --data, a look over the images."""

    data: Annotated[str | None, arg(metavar="PATH")] = None
    """Images to look over: a folder, a list file, tar shards, or "demo"."""
    split: Annotated[str | None, arg(metavar="NAME")] = None
    """Split of a source that has several (the demo: train, validation, test)."""
    samples: Annotated[int, arg(metavar="IMAGES")] = 200
    """Images whose headers are read, spread evenly over the source; 0 reads all of them."""
    max_pixels: Annotated[int, arg(metavar="PIXELS")] = 178_956_970
    """Images whose header claims more pixels count as bad, as in training."""
    max_bad_fraction: Annotated[float, arg(metavar="SHARE")] = 0.01
    """Share of bad images above which the data counts as bad, as in training."""
    run_dir: Annotated[Path, arg(metavar="DIR")] = Path("runs")
    """Where runs will be written: its disk is looked at."""


def machine(run_dir: Path) -> Iterator[Finding]:
    """Findings about the machine and the packages on it, in the order they are printed."""
    yield environment.python()
    for name in DEPENDENCIES:
        yield environment.library(name)
    yield environment.gpu()
    yield environment.precision()
    yield environment.triton()
    yield loadable(environment.dali(), "nvidia.dali.fn")
    yield environment.apex()
    yield environment.xformers()
    yield environment.library("tensorboard", why='pip install "fastbeit[tracking]" to use it')
    yield environment.library("wandb", why='pip install "fastbeit[tracking]" to use it')
    yield dall_e_tokenizer()
    yield from capacity(run_dir)


def dall_e_tokenizer() -> Finding:
    """Whether the published tokenizer, which the beit-* recipes ask for, has been converted."""
    from fastbeit.tokenizer.files import ENVIRONMENT_VARIABLE, cache_path

    path = Path(os.environ.get(ENVIRONMENT_VARIABLE) or cache_path()).expanduser()
    if path.is_file():
        return Finding("tokenizer", "ok", f"dall-e at {path}")
    return Finding(
        "tokenizer",
        "absent",
        f"dall-e (for the beit-* recipes) is not at {path}",
        "python -m fastbeit.tokenizer.convert makes it; demo and your own need nothing",
    )


def capacity(run_dir: Path) -> Iterator[Finding]:
    """Findings about cores, memory and disk."""
    cores = hardware.usable_cores()
    yield Finding("cpu", "ok", f"{hardware.cpu_name()}, {cores:g} usable core(s)")
    memory = hardware.memory_bytes()
    if memory is not None:
        yield Finding("memory", "ok", f"{memory / 2**30:.1f} GiB")
    shared = hardware.shared_memory_bytes()
    if shared is not None and shared < 2**30:
        yield Finding(
            "shared memory",
            "problem",
            f"/dev/shm holds {shared / 2**20:.0f} MiB, which worker processes fill quickly",
            "give the container more (docker run --shm-size 8g), or train with --workers 0",
        )
    free = hardware.free_disk_bytes(run_dir)
    state = "ok" if free > 5 * 2**30 else "problem"
    advice = "" if state == "ok" else "free some space, or choose another --run-dir"
    # A base model with its AdamW state takes 1.1 GB in fp32; two checkpoints are kept and a third
    # is written before the oldest goes.
    yield Finding("disk", state, f"{free / 2**30:.1f} GiB free for {run_dir}/", advice)


def will_run() -> list[str]:
    """What training takes on this machine by default, and why."""
    import torch

    from fastbeit.data.backend import choose_backend
    from fastbeit.training.backends import kernels_note

    gpu = environment.gpu()
    device = torch.device("cuda" if gpu.usable else "cpu")
    return [
        f"device: {device} ({gpu.text})",
        f"precision: bf16 unless the recipe says fp32 ({environment.precision().text})",
        choose_backend("auto", device)[1],
        "optimizer: PyTorch's fused AdamW unless --optimizer apex",
        f"kernels: {kernels_note('auto', device, 'bf16')}",
    ]


def loadable(finding: Finding, module: str) -> Finding:
    """``finding``, or a problem in its place where the module is there but does not import."""
    error = environment.import_error(module) if finding.usable else None
    if error is None:
        return finding
    return Finding(
        finding.name, "problem", f"{finding.text} does not load: {error}", "reinstall it"
    )


@dataclass(frozen=True)
class Survey:
    """What was seen in a source; sizes are after EXIF orientation, in pixels."""

    count: int
    examined: int
    formats: Counter[str]
    modes: Counter[str]
    sizes: list[tuple[int, int]]
    bad: list[tuple[str, str]]
    """Name and reason of each unusable image."""
    image_bytes: int
    """Encoded bytes of the images examined."""


def survey(source: Source, *, samples: int, max_pixels: int) -> Survey:
    """Read the headers of ``samples`` images, spread evenly over the source (0: of all)."""
    from fastbeit.data.header import BadImage, inspect_image

    count = len(source)
    wanted = count if samples == 0 else min(samples, count)
    found = Survey(count, wanted, Counter(), Counter(), [], [], 0)
    image_bytes = 0
    for k in range(wanted):
        index = k * count // wanted
        try:
            data = source.read(index)
            header = inspect_image(data, max_pixels=max_pixels)
        except (BadImage, OSError) as error:
            found.bad.append((source.name(index), str(error)))
            continue
        image_bytes += len(data)
        found.formats[header.format] += 1
        found.modes[header.mode] += 1
        found.sizes.append((header.height, header.width))
    return replace(found, image_bytes=image_bytes)


def describe(source: Source, seen: Survey, max_bad_fraction: float) -> Iterator[Finding]:
    """Findings about a source."""
    of_all = "" if seen.examined == seen.count else f" ({seen.examined:,} of them examined)"
    yield Finding("images", "ok", f"{seen.count:,}{of_all}")
    good = seen.examined - len(seen.bad)
    if good:
        kinds = ", ".join(f"{name} {n}" for name, n in seen.formats.most_common())
        modes = ", ".join(f"{name} {n}" for name, n in seen.modes.most_common())
        yield Finding("formats", "ok", f"{kinds}; colours: {modes}")
        areas = sorted(seen.sizes, key=lambda size: size[0] * size[1])
        small, middle, large = (
            f"{width}×{height}" for height, width in (areas[0], areas[good // 2], areas[-1])
        )
        text = f"width×height smallest {small}, median {middle}, largest {large}"
        yield Finding("sizes", "ok", f"{text}; {seen.image_bytes / good / 1024:.1f} KiB an image")
    if source.labels is None:
        yield Finding("labels", "absent", "none; pre-training needs none, a probe does")
    else:
        classes = int(source.labels.max()) + 1
        per_class = Counter(source.labels.tolist()).values()
        yield Finding(
            "labels", "ok", f"{classes} classes, {min(per_class)} to {max(per_class)} images each"
        )
    share = len(seen.bad) / seen.examined
    if not seen.bad:
        yield Finding("bad images", "ok", "none among those examined")
    else:
        yield Finding(
            "bad images",
            "problem" if share > max_bad_fraction else "ok",
            f"{len(seen.bad)} of {seen.examined} examined ({share:.1%}); training replaces each "
            f"by the next good one and stops above {max_bad_fraction:.1%}",
            "mend or remove them" if share > max_bad_fraction else "",
        )


def look_over(options: DoctorOptions, data: str) -> bool:
    """Print findings about the images; False where they can't be trained on."""
    from fastbeit.data import open_source

    try:
        source = open_source(data, split=options.split)
    except (ValueError, OSError) as error:
        print(Finding("data", "problem", str(error)))
        return False
    seen = survey(source, samples=options.samples, max_pixels=options.max_pixels)
    findings = list(describe(source, seen, options.max_bad_fraction))
    for finding in findings:
        print(finding)
    for name, reason in seen.bad[:MAX_BAD_SHOWN]:
        print(f"        {name}: {reason}")
    if len(seen.bad) > MAX_BAD_SHOWN:
        print(f"        and {len(seen.bad) - MAX_BAD_SHOWN} more")
    return all(finding.state != "problem" for finding in findings)


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    options = tyro.cli(DoctorOptions, args=arguments, prog="python -m fastbeit.doctor")
    print(f"fastbeit {__version__}")
    problems = 0
    for finding in machine(options.run_dir):
        problems += finding.state == "problem"
        print(finding)
    print("\nWhat will run:")
    for line in will_run():
        print(f"  {line}")
    if options.data is not None:
        print(f"\nData: {options.data}" + (f", split {options.split}" if options.split else ""))
        if not look_over(options, options.data):
            return EXIT_DATA
    return EXIT_MACHINE if problems else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
