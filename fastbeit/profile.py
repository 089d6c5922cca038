"""Where the time of a training step goes: a few real steps under PyTorch's profiler.

    torchrun --standalone -m fastbeit.profile beit-base-in1k --data DIR --tokenizer FILE
    python -m fastbeit.profile [RECIPE] [--profile-steps 3] [--profile-skip 2] [--profile-out DIR]
                               [any flag of fastbeit.pretrain]

It runs the training loop of ``fastbeit.pretrain`` itself, in a temporary run folder, lets
``--profile-skip`` steps pass (compilation, allocators, loader start-up), records the next ones, and
stops without saving a model. Steps run eagerly, tokens in their turn, whatever the flags say: what
a graph replays or runs beside a step has no phase to be counted to.

Written to ``--profile-out`` (default ``runs/profile``):

    trace-rank0.json   for chrome://tracing or ui.perfetto.dev, one a rank
    profile.json       the table's numbers, of rank 0
    profile.txt        the table that is also printed

Each part's time stands beside its roofline: the counted FLOPs at the device's peak, from the data
sheet for a known GPU, on a CPU measured with one large matrix product before the run. Exit codes
are those of ``fastbeit.pretrain``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastbeit import cli, pretrain
from fastbeit.data import open_source
from fastbeit.tokenizer import load_tokenizer
from fastbeit.training import control, distributed, layout, setup, trace
from fastbeit.training.config import PretrainConfig
from fastbeit.training.cost import student_flops, tokenizer_flops
from fastbeit.training.peak import peak_flops
from fastbeit.training.tokenizing import choose_precision

PROG = "python -m fastbeit.profile"
PRODUCT_SIDE = 2048
PRODUCT_ROUNDS = 5


class Recorded(Exception):
    """Leaves the training loop when the last profiled step is done."""


class Recorder:
    """Called after every step: starts the profiler, stops it, and then leaves the loop."""

    def __init__(self, skip: int, steps: int, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # Of one cycle; torch 2.11 warns that events of cycles before it are lost unless told so.
        self.profiler = profile(activities=activities, acc_events=True)
        self.device = device
        self._skip = skip
        self._steps = steps
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        if self._done == self._skip:
            self._settle()
            self.profiler.start()
        elif self._done == self._skip + self._steps:
            self._settle()
            self.profiler.stop()
            raise Recorded

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def options_of(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own flags, and the words for ``fastbeit.pretrain``."""
    parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--profile-steps", type=int, default=3)
    parser.add_argument("--profile-skip", type=int, default=2)
    parser.add_argument("--profile-out", type=Path, default=Path("runs/profile"))
    own, rest = parser.parse_known_args(words)
    for flag, value in (
        ("--profile-steps", own.profile_steps),
        ("--profile-skip", own.profile_skip),
    ):
        if value < 1:
            parser.error(f"{flag} must be at least 1, got {value}")
    if "--help" in rest or "-h" in rest:
        print(__doc__)
    return own, rest


def measured_product(dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product on this process's CPU threads, the best of a few."""
    a, b = (torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).to(dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(PRODUCT_ROUNDS):
        began_s = time.perf_counter()
        torch.mm(a, b)
        best_s = min(best_s, time.perf_counter() - began_s)
    return 2 * PRODUCT_SIDE**3 / best_s


def peaks_of(config: PretrainConfig, device: torch.device) -> tuple[dict[str, float | None], str]:
    """FLOP/s by phase, and where they come from."""
    student, tokens = config.run.precision, config.tokenizer.tokenizer_precision
    rates: dict[str, float | None] = {}
    sources: dict[str, str] = {}
    for precision in {student, tokens}:
        if device.type == "cpu":
            rates[precision] = rate = measured_product(setup.DTYPES[precision])
            sources[precision] = (
                f"{rate / 1e12:.2f} TFLOP/s {precision}, measured: the best of "
                f"{PRODUCT_ROUNDS} products of side {PRODUCT_SIDE} on {torch.get_num_threads()} "
                "threads"
            )
        else:
            peak = peak_flops(device, "fp32" if precision == "fp32" else "bf16")
            rates[precision], sources[precision] = peak.flops_per_s, peak.source
    phases = {"tokenize": rates[tokens], "forward": rates[student], "backward": rates[student]}
    return phases, "; ".join(sources.values())


def main(argv: list[str] | None = None) -> int:
    """Profile; returns the process's exit code."""
    own, words = options_of(sys.argv[1:] if argv is None else argv)
    command = cli.parse(words, prog=PROG)
    if command.plan:
        print("error: --plan goes with fastbeit.pretrain", file=sys.stderr)
        return control.EXIT_USAGE
    try:
        world = distributed.start(command.config.run.device)
        # Rank 0 must not take the folder away while others still write theirs.
        with tempfile.TemporaryDirectory(prefix="fastbeit-profile-") as folder:
            config = _for_profiling(command.config, Path(folder), own)
            own.profile_out.mkdir(parents=True, exist_ok=True)
            recorder = Recorder(own.profile_skip, own.profile_steps, world.device)
            try:
                code = pretrain.train(config, world, after_step=recorder)
            except Recorded:
                _write(recorder, config, world, own)
                world.barrier()
                return control.EXIT_OK
        return code
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if distributed.several_ranks():  # leaving an NCCL group would wait for them
            distributed.leave(control.EXIT_USAGE)
        return control.EXIT_USAGE
    finally:
        distributed.stop()


def _for_profiling(config: PretrainConfig, folder: Path, own: argparse.Namespace) -> PretrainConfig:
    """Enough steps, in a folder of its own, that neither save nor read numbers meanwhile."""
    steps = own.profile_skip + own.profile_steps + 1
    run = replace(
        config.run,
        run_dir=folder,
        steps=steps,
        log_every=steps,
        checkpoint_every=steps,
        tensorboard=False,
        wandb=False,
        cuda_graph="off",
        tokenize_ahead="off",
    )
    warmup = replace(config.optimizer, warmup_steps=0)
    return replace(config, run=run, optimizer=warmup)


def _write(
    recorder: Recorder,
    asked: PretrainConfig,
    world: distributed.World,
    own: argparse.Namespace,
) -> None:
    out, steps = own.profile_out, own.profile_steps
    recorder.profiler.export_chrome_trace(str(out / f"trace-rank{world.rank}.json"))
    if not world.is_main:
        return
    config = setup.settle_precision(asked, world.device)
    events: Any = recorder.profiler.events() or []
    times = trace.time_by_part(events, on_gpu=world.device.type == "cuda")
    micro_batch, accumulation, _ = layout.resolve_batch(config, world.size)
    tokenizer = load_tokenizer(
        config.tokenizer.tokenizer, device=world.device, impl=config.run.kernels
    )
    dvae = tokenizer.config
    if config.tokenizer.tokenizer_precision == "auto":  # as the run has chosen it
        source = open_source(config.data.data)
        precision: Any = choose_precision(tokenizer, config, source, world.device)[0]
        config = replace(config, tokenizer=replace(config.tokenizer, tokenizer_precision=precision))
    slots = config.mask.target
    flops = trace.counted(
        student_flops(config.model, slots),
        tokenizer_flops(dvae, config.model.grid, slots),
        micro_batch * accumulation,
    )
    peaks, source = peaks_of(config, world.device)
    rows = trace.rows(times, steps, flops, peaks)
    step_ms = sum(row.ms for row in rows)
    images_per_s = 1e3 * config.run.global_batch / step_ms
    text = (
        f"{steps} steps of {config.recipe} on {world.size} x {world.device.type}, "
        f"{micro_batch} images x {accumulation} a rank, torch {torch.__version__}\n"
        f"limit: {source}\n\n{trace.table(rows)}\n\n"
        f"{images_per_s:.2f} images/s under the profiler, which slows small operations\n"
    )
    (out / "profile.txt").write_text(text, encoding="utf-8")
    numbers = {"steps": steps, "peaks": source, "rows": [asdict(row) for row in rows]}
    (out / "profile.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    print(text)
    print(f"written: {out / 'profile.txt'}, {out / 'profile.json'}, {out / 'trace-rank0.json'}")


if __name__ == "__main__":
    distributed.leave(main())
