"""Runs of ``python -m fastbeit.pretrain`` in processes of their own, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY = [
    "smoke",
    "--precision=fp32",
    "--loader=reference",
    "--workers=0",
    "--log-every=1",
    "--shard=zero2",
    "--no-evaluate",
    "--warmup-steps=0",
]
"""A two-block model on a few images; no worker processes, so that a run starts quickly."""


class Run:
    """One run folder, and the commands that work on it."""

    def __init__(self, run_dir: Path, data: Path | str) -> None:
        self.dir = run_dir
        self.data = data

    def command(self, *flags: str, ranks: int | None = 1, torchrun: tuple[str, ...] = ()):
        """Plain ``python -m`` for ranks=None, torchrun otherwise."""
        start = [sys.executable]
        if ranks is not None:
            start += ["-m", "torch.distributed.run", "--standalone"]
            start += [f"--nproc-per-node={ranks}", *torchrun]
        start += ["-m", "fastbeit.pretrain", *TINY, f"--run-dir={self.dir}"]
        return [*start, f"--data={self.data}", *flags]

    @property
    def environment(self):
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def start(self, *flags: str, **options) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*flags, **options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def finish(self, *flags: str, code: int = 0, **options) -> subprocess.CompletedProcess:
        done = subprocess.run(
            self.command(*flags, **options),
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=240,
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    @property
    def metrics(self) -> dict[int, dict]:
        lines = (self.dir / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record for record in map(json.loads, lines)}

    @property
    def losses(self) -> list[float]:
        return [record["loss_nats"] for record in self.metrics.values()]

    @property
    def exit(self) -> dict:
        return json.loads((self.dir / "exit.json").read_text())


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder of 70 smooth random 40x32 PNGs: two epochs of 32 are 4 steps, 6 are left over."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(70):
        coarse = generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 40), Image.Resampling.BICUBIC).save(
            folder / f"{number:03d}.png"
        )
    return folder


@pytest.fixture
def run(tmp_path, images) -> Run:
    return Run(tmp_path / "run", images)


@pytest.fixture
def other_run(tmp_path, images) -> Run:
    return Run(tmp_path / "other", images)
