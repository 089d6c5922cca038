"""Finds the loader's fastest settings on this machine and these images, and records them.

    python -m fastbeit.data.tune beit-base-in1k --data DIR [any flag of fastbeit.pretrain]
                        [--tune-seconds 180] [--tune-rounds 3] [--tune-ranks COUNT]
                        [--step-images-per-s RATE | --tune-run RUN_DIR] [--tune-out DIR]

The loader runs alone, with the recipe's crops, jitter and micro-batch. On a GPU DALI's threads,
batches ahead and the hardware decoder's share (0.6 to 0.9) are searched; on a CPU workers and
batches ahead of DALI and of the PIL loader. ``--loader`` keeps to one of them. One rank is
measured, on its share of the cores: ``--tune-ranks`` ranks share the machine (default: one a GPU).

``--tune-seconds`` is when the last measurement begins; a slow loader's takes its time.

Printed: every setting with its rate, the best one as flags, and, if a step's rate is known (images
per second and rank, given or from a run's metrics.jsonl), whether the loader outruns it by 1.3.
Written to ``--tune-out`` (runs/loader): a dated JSON file with all of it, never an existing one.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from fastbeit import cli, hardware
from fastbeit.data import BatchSchedule, make_loader, open_source
from fastbeit.data.backend import dali_problem
from fastbeit.data.bad import TooManyBadSamples
from fastbeit.data.loader import Loader, default_workers
from fastbeit.data.tune_record import machine, mean_kb, report, results, write_new
from fastbeit.data.tune_search import (
    Axes,
    Search,
    Setting,
    counts_up_to,
    has_hardware_decoder,
    loader_rate,
)
from fastbeit.tokenizer import load_tokenizer
from fastbeit.tokenizer.dvae import DvaeConfig
from fastbeit.training import checkpoint, control, distributed, layout, setup
from fastbeit.training.config import PretrainConfig
from fastbeit.training.metrics import METRICS_FILE, read_metrics

PROG = "python -m fastbeit.data.tune"
PREFETCH = (1, 2, 4)
HW_DECODER_LOADS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
MOST_WORKERS = 16


def main(argv: list[str] | None = None) -> int:
    """Tune; returns the process's exit code."""
    own, words = options_of(sys.argv[1:] if argv is None else argv)
    command = cli.parse(words, prog=PROG)
    if command.plan:
        print("error: --plan goes with fastbeit.pretrain", file=sys.stderr)
        return control.EXIT_USAGE
    try:
        step_rate = own.step_images_per_s
        if own.tune_run is not None:
            step_rate = step_rate_of(own.tune_run)
        record = tune(command.config, own, step_rate)
        path = write_new(own.tune_out, record)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        bad_data = isinstance(error, TooManyBadSamples)
        return control.EXIT_BAD_DATA if bad_data else control.EXIT_USAGE
    print(report(record))
    print(f"written: {path}")
    return control.EXIT_OK


def options_of(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own flags, and the words for ``fastbeit.pretrain``."""
    parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--tune-seconds", type=float, default=180.0)
    parser.add_argument("--tune-rounds", type=int, default=3)
    parser.add_argument("--tune-ranks", type=int)
    parser.add_argument("--tune-out", type=Path, default=Path("runs/loader"))
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--step-images-per-s", type=float)
    rate.add_argument("--tune-run", type=Path)
    own, rest = parser.parse_known_args(words)
    for name in ("tune_seconds", "tune_rounds", "tune_ranks", "step_images_per_s"):
        value = getattr(own, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if "--help" in rest or "-h" in rest:
        print(__doc__)
    return own, rest


def step_rate_of(run_dir: Path) -> float:
    """Images per second and rank of a run's step: the median of its log, the first line left out.

    Waiting for data is taken out: a run that waits would make the step as slow as its loader.

    Raises:
        ValueError: no log, or no checkpoint that says how many ranks there were.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"--tune-run {run_dir} holds no {METRICS_FILE}: give the folder of a run")
    rates = [
        line["images_per_s"] / (1.0 - min(line.get("data_wait_share") or 0.0, 0.99))
        for line in read_metrics(path)
        if line.get("images_per_s")
    ]
    saved = checkpoint.find_latest(run_dir / "checkpoints")
    if not rates or saved is None:
        raise ValueError(
            f"{run_dir} has no {'rates in its log' if not rates else 'checkpoint'} yet: give "
            "--step-images-per-s instead"
        )
    return median(rates[1:] or rates) / saved.state["world_size"]


def tune(
    config: PretrainConfig, own: argparse.Namespace, step_rate: float | None
) -> dict[str, Any]:
    """Searches, and returns the record.

    Raises:
        ValueError, RuntimeError: what ``fastbeit.pretrain`` refuses too; DALI asked for and absent.
    """
    device = distributed.pick_device(config.run.device, 0)
    config = setup.settle_precision(config, device)
    source = open_source(config.data.data)
    ranks = own.tune_ranks or (torch.cuda.device_count() if device.type == "cuda" else 1)
    batch = layout.resolve_batch(config, ranks).micro_batch
    cores = share_of_cores(ranks)
    views, note = view_sizes(config)
    search_ends_s = time.monotonic() + own.tune_seconds

    def open_loader(setting: Setting) -> Loader:
        load = setting.hw_decoder_load
        return make_loader(
            source,
            config.plan_spec(),
            views,
            BatchSchedule(len(source), batch, config.run.seed),
            seed=config.run.seed,
            total_steps=1_000_000_000,
            backend=setting.loader,  # pyright: ignore[reportArgumentType]
            workers=setting.workers,
            prefetch=setting.prefetch,
            hw_decoder_load=config.data.hw_decoder_load if load is None else load,
            device=device,
            dtype=setup.DTYPES[config.run.precision],
            max_bad_fraction=config.data.max_bad_fraction,
            max_pixels=config.data.max_pixels,
        )

    found = [axes_of(name, config, device, cores) for name in loaders_of(config, device)]
    settings = sum(len(axes.along(name, axes.start)) for axes in found for name in axes.names)
    # Half of the time for measuring, half for starting loaders and filling their queues.
    each_s = own.tune_seconds / (2 * own.tune_rounds * settings)
    search = Search(
        lambda setting: loader_rate(open_loader, setting, each_s), own.tune_rounds, search_ends_s
    )
    ends = []
    for number, axes in enumerate(found, start=1):
        # A loader leaves the ones after it their share of the time.
        search.ends_s = search_ends_s - own.tune_seconds * (1 - number / len(found))
        ends.append(search.run(axes))
    search.ends_s = math.inf  # a few more measurements where loaders are close
    best = search.duel(ends)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine(device),
        "cores": cores,
        "ranks_on_the_machine": ranks,
        "recipe": config.recipe,
        "images": len(source),
        "image_kb": mean_kb(source),
        "size": list(config.model.image_hw),
        "jitter": list(config.data.jitter),
        "micro_batch": batch,
        "note": note,
        **results(search, best, step_rate),
    }


def share_of_cores(ranks: int) -> int:
    """Keeps this process, and what it starts, on a rank's share of the cores; how many that are."""
    if not hasattr(os, "sched_setaffinity"):  # macOS
        return max(1, int(hardware.usable_cores()) // ranks)
    mine = sorted(os.sched_getaffinity(0))
    share = max(1, int(min(len(mine), hardware.usable_cores())) // ranks)
    if ranks > 1:
        os.sched_setaffinity(0, mine[:share])
    return share


def loaders_of(config: PretrainConfig, device: torch.device) -> list[str]:
    """Who is tuned: what was asked for, on a GPU DALI, on a CPU both."""
    if config.data.loader != "auto":
        return [config.data.loader]
    if dali_problem() is not None:
        return ["reference"]
    return ["dali"] if device.type == "cuda" else ["reference", "dali"]


def axes_of(loader: str, config: PretrainConfig, device: torch.device, cores: int) -> Axes:
    """Where the search starts (the defaults of ``config``) and what it tries."""
    workers = config.data.workers
    if workers is None:
        workers = min(default_workers(device), cores)
    hardware_decoder = loader == "dali" and has_hardware_decoder(device)
    load = config.data.hw_decoder_load if hardware_decoder else None
    counts = counts_up_to(min(cores, MOST_WORKERS))
    return Axes(
        Setting(loader, workers, config.data.prefetch, load),
        workers=counts if device.type == "cuda" else [0, *counts],
        prefetch=PREFETCH,
        hw_decoder_load=HW_DECODER_LOADS if hardware_decoder else (),
    )


def view_sizes(config: PretrainConfig) -> tuple[Any, str | None]:
    """Both views; where the tokenizer isn't there yet, DALL-E's sizes stand in, and a note."""
    note = None
    try:
        tokenizer: Any = load_tokenizer(config.tokenizer.tokenizer)
    except ValueError as error:
        note = f"DALL-E's view of an image stands in: {str(error).splitlines()[0]}"
        tokenizer = SimpleNamespace(**vars(DvaeConfig()), stride=DvaeConfig().stride)
        tokenizer.vocab_size = config.model.vocab_size
    return setup.view_spec(config, tokenizer), note


if __name__ == "__main__":
    sys.exit(main())
