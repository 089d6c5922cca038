"""The model of many GPUs against what two processes measure on this CPU, over gloo.

    python -m fastbeit.training.scale_check [--rounds 9] [--out FILE]

One torchrun of two processes, one thread each. In every round, interleaved: a step of one process
while the other waits (*alone*), of both without communication until the slower is done (*beside*),
of both under each sharding mode, and each kind of collective at two sizes. The model then gets the
time of a step without communication and the collectives' latency and bandwidth, and predicts the
steps with it. From *alone* it knows nothing of the two processes sharing memory and caches; from
*beside* it does, so what is left is the model's own error. Other work on the machine only ever adds
time, and to a step of two processes at every collective: so the least of the rounds is compared.
The load is printed; above the number of idle cores the table says little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fastbeit import hardware
from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.training import distributed
from fastbeit.training.config import OptimizerConfig
from fastbeit.training.distributed import World
from fastbeit.training.optimizer import build_optimizer
from fastbeit.training.scale import Collective, Mode, groups, model_units, traffic
from fastbeit.training.scale_time import Compute, Cost, gpu_time

PROG = "python -m fastbeit.training.scale_check"
MODES: tuple[Mode, ...] = ("none", "zero2", "zero3")
WIDTH, BATCH, SLOTS = 384, 4, 24
SMALL_BYTES, LARGE_BYTES = 1 << 12, 1 << 24
Times = dict[str, list[float]]

# Renamed in torch 2.13, which warns of the older names.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def main(argv: list[str] | None = None) -> int:
    """Measure, predict, print; the process's exit code."""
    parser = argparse.ArgumentParser(prog=PROG, description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="interleaved repeats (9)")
    parser.add_argument("--width", type=int, default=WIDTH, help=f"of the model ({WIDTH})")
    parser.add_argument("--out", type=Path, help="also write all times there, as JSON")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    model = model_config(options.width)
    if options.worker is not None:
        _work(options.worker, options.rounds, model)
        return 0
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="fastbeit-scale-") as folder:
        out = Path(folder) / "times.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "-m", "fastbeit.training.scale_check"]
        command += ["--rounds", str(options.rounds), "--width", str(options.width)]
        command += ["--worker", str(out)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            return done.returncode
        times: Times = json.loads(out.read_text(encoding="utf-8"))
    rows = compare(times, model)
    load = {"before": before[0], "after": os.getloadavg()[0]}
    if options.out is not None:
        record = {"cpu": hardware.cpu_name(), "torch": torch.__version__, "load": load}
        record |= {"times_s": times, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(report(times, rows))
    print(
        f"\n{hardware.cpu_name()}, torch {torch.__version__}, 1 thread a process, "
        f"{options.rounds} rounds; load {load['before']:.1f} before, {load['after']:.1f} after"
    )
    return 0


def model_config(width: int) -> BeitConfig:
    """Two units of blocks, and as much to send for its arithmetic as makes a difference."""
    return BeitConfig(image_size=64, patch_size=8, width=width, depth=6, heads=6, vocab_size=1024)


def measured_cost(times: Times) -> Cost:
    """A collective's seconds from the least of its kind at two sizes: latency, and bandwidth."""

    def cost(call: Collective) -> float:
        small, large = (min(times[f"{call.kind} {n}"]) for n in (SMALL_BYTES, LARGE_BYTES))
        slope = max(0.0, large - small) / (LARGE_BYTES - SMALL_BYTES)
        return max(0.0, small - slope * SMALL_BYTES) + slope * call.size

    return cost


def compare(times: Times, model: BeitConfig) -> list[dict[str, Any]]:
    """For each mode its measured step, and what the model makes of both baselines, in seconds."""
    units = model_units(model, "fp32")
    rows = []
    for mode in MODES:
        row: dict[str, Any] = {"mode": mode, "measured": min(times[mode])}
        for baseline in ("alone", "beside"):
            update = min(times[f"{baseline} update"])
            blocks = (min(times[baseline]) - update) / 3 / model.depth
            found = gpu_time(
                Compute(0.0, 0.0, (blocks,) * model.depth, 0.0, update),
                traffic(units, mode, 2, 2),
                measured_cost(times),
                shards=groups(mode, 2, 2)[0].ranks,
                overlap=False,  # FSDP2 on a CPU has no streams
            )
            row[f"from {baseline}"] = found.seconds
            row["communication"] = found.intra
        rows.append(row)
    return rows


def report(times: Times, rows: list[dict[str, Any]]) -> str:
    """The measurements and the comparison, as two tables."""
    lines = ["measured                 least ms   quartiles"]
    for name, values in times.items():
        low, middle, high = quantiles(values, n=4)
        spread = f"{1e3 * low:.2f}, {1e3 * middle:.2f}, {1e3 * high:.2f}"
        lines.append(f"{name:<24} {1e3 * min(values):>8.2f}   {spread}")
    lines += ["", "step of two processes    measured ms   predicted from alone   from beside"]
    for row in rows:
        alone, beside = (
            f"{1e3 * row[name]:8.1f} ({row[name] / row['measured'] - 1:+.0%})"
            for name in ("from alone", "from beside")
        )
        lines.append(f"{row['mode']:<24} {1e3 * row['measured']:>11.1f} {alone:>22} {beside:>13}")
    return "\n".join(lines)


def _work(out: Path, rounds: int, model: BeitConfig) -> None:
    """In each of the two processes: all measurements, written by rank 0."""
    world = distributed.start("cpu")
    torch.set_num_threads(1)
    alone = _Stepper(world, model, None)
    steppers = {mode: _Stepper(world, model, mode) for mode in MODES}
    times: Times = {}

    def measure(name: str, action: Callable[[], Any]) -> None:
        world.barrier()
        began_s = time.perf_counter()
        action()
        world.barrier()
        times.setdefault(name, []).append(time.perf_counter() - began_s)

    for number in range(rounds + 1):
        if number == 1:  # the first round allocates and connects
            times.clear()
        world.barrier()
        if world.is_main:
            times.setdefault("alone", []).append(alone.step())
            times.setdefault("alone update", []).append(alone.update_s)
        measure("beside", alone.step)
        times.setdefault("beside update", []).append(alone.update_s)
        for mode, stepper in steppers.items():
            measure(mode, stepper.step)
        for size in (SMALL_BYTES, LARGE_BYTES):
            whole, part = torch.zeros(size // 4), torch.zeros(size // 8)
            measure(f"all_reduce {size}", partial(dist.all_reduce, whole))
            measure(f"all_gather {size}", partial(_gather, whole, part))
            measure(f"reduce_scatter {size}", partial(_scatter, part, whole))
    if world.is_main:
        out.write_text(json.dumps(times), encoding="utf-8")
    world.barrier()
    distributed.stop()


class _Stepper:
    """A model and its optimizer, spread by ``mode``; None: this process's own, for comparison."""

    def __init__(self, world: World, config: BeitConfig, mode: Mode | None) -> None:
        self.model: Any = BeitForMim(config, seed=0)
        self.together = mode is not None
        self.update_s = 0.0
        if mode is None:
            names = ("replicate", "shard")
            mesh = init_device_mesh("cpu", (world.size, 1), mesh_dim_names=names)["shard"]
        else:
            mesh = distributed.make_mesh(world, mode)
        distributed.shard_model(self.model, mesh, mode=mode or "zero2", precision="fp32")
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        generator = torch.Generator().manual_seed(world.rank)
        self.images = torch.randn(BATCH, 3, *config.image_hw, generator=generator)
        self.positions = torch.arange(SLOTS, dtype=torch.int32).expand(BATCH, -1)
        self.targets = torch.zeros(BATCH, SLOTS, dtype=torch.int64)

    def step(self) -> float:
        """One optimizer step; its seconds."""
        began_s = time.perf_counter()
        self.model.loss(self.images, self.positions, self.targets).loss.backward()
        if self.together:
            dist.all_reduce(torch.zeros(4, dtype=torch.float64))  # as the step's totals
        update_s = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        ended_s = time.perf_counter()
        self.update_s = ended_s - update_s
        return ended_s - began_s


if __name__ == "__main__":
    distributed.leave(main())
