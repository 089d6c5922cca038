"""Runs of `fastbeit.pretrain`, its loader included, timed by their own metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.results import ROOT
from benchmarks.roofline import Work
from benchmarks.steps.problem import Problem
from fastbeit import pretrain
from fastbeit.recipes import beit_base_in1k, demo
from fastbeit.tokenizer.files import save_tokenizer
from fastbeit.training.config import PretrainConfig
from fastbeit.training.distributed import World

REFERENCE = {"kernels": "reference", "attention": "reference", "compile": "off"}
"""Of `RunConfig`: nothing but plain PyTorch."""


@dataclass(frozen=True)
class Finished:
    """What the metrics of a run say. The first line is left out: it pays for start-up."""

    losses: list[float]
    seconds: float
    images: int
    wait_share: float
    """Of the time, in which the loop waited for the loader."""

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds


class LastStep(Exception):
    """Leaves the training loop, which saves nothing then."""


def read(run_dir: Path) -> Finished:
    """Of a run that logged every ``log_every`` steps, twice at least."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if len(rows) < 2:
        raise ValueError(f"{run_dir} has {len(rows)} lines of metrics, a time needs two")
    return Finished(
        losses=[row["loss_nats"] for row in rows],
        seconds=rows[-1]["time_s"] - rows[0]["time_s"],
        images=rows[-1]["images_seen"] - rows[0]["images_seen"],
        wait_share=sum(row["data_wait_share"] for row in rows[1:]) / (len(rows) - 1),
    )


def demo_config(batch: int) -> PretrainConfig:
    config = demo.config()
    return replace(config, run=replace(config.run, global_batch=batch))


def base_config(photos: Path, tokenizer: Path, problem: Problem) -> PretrainConfig:
    """BEiT-B's recipe on a folder of photographs, with the problem's sizes and DropPath on."""
    config = beit_base_in1k.config()
    min_block = min(config.mask.min_block, problem.masked // 2)
    return replace(
        config,
        model=replace(problem.model, drop_path=config.model.drop_path),
        mask=replace(config.mask, target=problem.masked, min_block=min_block),
        data=replace(config.data, data=str(photos)),
        tokenizer=replace(config.tokenizer, tokenizer=str(tokenizer)),
        run=replace(config.run, global_batch=problem.batch),
    )


def random_tokenizer(path: Path, problem: Problem) -> Path:
    """A file with the problem's tokenizer."""
    save_tokenizer(path, problem.encoder(), origin={"source": "random weights"})
    return path


def for_timing(
    config: PretrainConfig, run_dir: Path, lines: int, log_every: int = 1, *, plain: bool = False
) -> PretrainConfig:
    """``lines`` lines of metrics, and two steps more: one to leave from, one never reached.
    ``plain``: the reference path."""
    steps = lines * log_every + 2
    run = replace(
        config.run,
        run_dir=run_dir,
        steps=steps,
        log_every=log_every,
        checkpoint_every=steps + 1,
        precision="auto",
        evaluate=False,
    )
    data = config.data
    if plain:
        run, data = replace(run, **REFERENCE), replace(data, loader="reference")
    warmup = replace(config.optimizer, warmup_steps=0)
    return replace(config, data=data, run=run, optimizer=warmup)


def run_here(config: PretrainConfig, world: World) -> Finished:
    """In this process, up to the last step but without its checkpoint and export."""
    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1
        if done == (config.run.steps or 0) - 1:
            raise LastStep

    with warnings.catch_warnings():
        # The run's lock is let go of where train's frame is: here.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            pretrain.train(config, world, after_step=after_step)
        except LastStep:
            return read(config.run_dir)
    raise RuntimeError(f"the run ended at step {done} of {config.run.steps}: see its messages")


def run_processes(
    processes: int, flags: Sequence[str], run_dir: Path, timeout_s: float = 240.0
) -> Finished:
    """``torchrun -m fastbeit.pretrain`` with one thread a process.

    Raises:
        RuntimeError: it failed; with what it printed last.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "fastbeit.pretrain", *flags]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    done = subprocess.run(
        [*command, f"--run-dir={run_dir}"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return read(run_dir)


def times(work: Work, count: int) -> Work:
    """That work, ``count`` times."""
    return Work(count * work.flops, count * work.bytes)


def unmeasured_s(run: Finished, began_s: float) -> float:
    """Seconds since ``began_s`` that are no part of what the run's metrics time."""
    return time.perf_counter() - began_s - run.seconds
