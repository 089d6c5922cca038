"""A step whose loss is not finite on one rank is skipped on all; the log window knows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from fastbeit.training.step import StepResult, Window

WORKER = Path(__file__).with_name("skip_worker.py")


def test_a_nan_on_one_rank_is_skipped_on_every_rank(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(WORKER), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert records[0] == records[1]
    for record in records:
        assert record["skipped"] == [0.0, 1.0, 0.0]
        assert record["moved"] == [True, False, True]
        assert record["optimizer_steps"] == [1.0, 1.0, 2.0]
        assert record["empty_loss"] == 0.0 and record["empty_skipped"] == 0.0


def result(loss, skipped=0.0):
    values = (loss, 0.5, 10.0, 2.0 * loss, skipped)
    return StepResult(*(torch.tensor(value, dtype=torch.float64) for value in values))


def test_window_means_leave_skipped_steps_out_and_start_again():
    window = Window(torch.device("cpu"))
    for loss, skipped in ((1.0, 0.0), (float("nan"), 1.0), (3.0, 0.0)):
        window.add(result(loss, skipped))
    assert window.read() == {
        "loss_nats": 2.0,
        "accuracy": 0.5,
        "grad_norm": 4.0,
        "skipped_steps": 1.0,
    }
    window.add(result(float("inf"), 1.0))
    assert window.read() == {
        "loss_nats": None,
        "accuracy": None,
        "grad_norm": None,
        "skipped_steps": 1.0,
    }


def test_streak_counts_steps_in_a_row_only():
    window = Window(torch.device("cpu"))
    for skipped in (1.0, 1.0, 0.0, 1.0):
        window.add(result(1.0, skipped))
    assert window.streak_if_ready() == 2  # the longest since it was last asked
    window.add(result(1.0, 1.0))
    assert window.streak_if_ready() == 2  # this one and the one before
    window.add(result(1.0, 0.0))
    assert window.streak_if_ready() == 0
