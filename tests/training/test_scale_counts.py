"""The collectives that the model of many GPUs counts, against those that real steps call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastbeit.model import BeitConfig
from fastbeit.training.scale import Mode, model_units, traffic

WORKER = Path(__file__).with_name("collectives_worker.py")
CONFIG = BeitConfig(image_size=32, patch_size=8, width=42, depth=4, heads=3, vocab_size=51)
ACCUMULATION = 2
WORLDS = ("12x4", "512x8")


def run(command: list[str], out: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("two") / "out.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return run([*torchrun, "--nproc-per-node", "2", str(WORKER), str(out)], out)


@pytest.fixture(scope="module")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("pretended") / "out.json"
    return run([sys.executable, str(WORKER), str(out), *WORLDS], out)


def counted(mode: Mode, ranks: int, per_node: int, precision: str) -> list[Any]:
    sends = traffic(model_units(CONFIG, precision), mode, ranks, per_node)
    calls = Counter((c.kind, c.size, c.group.ranks) for c in sends.collectives(ACCUMULATION))
    return sorted([*call, count] for call, count in calls.items())


@pytest.mark.parametrize(
    ("mode", "precision"),
    [("none", "fp32"), ("zero2", "bf16"), ("zero3", "fp32"), ("zero3", "bf16")],
)
def test_two_processes_call_what_the_model_counts(
    two_processes: dict[str, Any], mode: Mode, precision: str
) -> None:
    """Kind, bytes, number of calls: of one optimizer step of two micro-batches, over gloo."""
    assert two_processes[f"{mode} {precision}"] == counted(mode, 2, 2, precision)


@pytest.mark.parametrize("mode", ["none", "zero2", "zero3", "hybrid"])
@pytest.mark.parametrize("world", WORLDS)
def test_many_ranks_call_what_the_model_counts(
    pretended: dict[str, Any], world: str, mode: Mode
) -> None:
    """Padding to 4, 8, 12 and 512 parts, and hybrid's all-reduce of shards, in pretended worlds."""
    ranks, per_node = map(int, world.split("x"))
    assert pretended[f"{world} {mode}"] == counted(mode, ranks, per_node, "fp32")
