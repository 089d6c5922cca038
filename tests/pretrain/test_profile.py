"""``python -m fastbeit.profile``: the training loop itself, recorded for a few steps."""

from __future__ import annotations

import json
import subprocess
import sys

from .conftest import TINY


def profiled(folder, images, *flags: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastbeit.profile", *TINY, f"--data={images}"]
    done = subprocess.run(
        [*command, f"--profile-out={folder}", *flags], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_profile_of_the_training_loop(images, tmp_path) -> None:
    out = tmp_path / "profile"
    done = profiled(out, images, "--profile-steps=2", "--profile-skip=1")
    assert "2 steps of smoke on 1 x cpu" in done.stdout
    found = json.loads((out / "profile.json").read_text())
    rows = {(row["phase"], row["part"]): row for row in found["rows"]}
    assert {phase for phase, _ in rows} == {"load", "tokenize", "forward", "backward", "update"}
    for key in (("tokenize", "convolutions"), ("backward", "linear layers")):
        assert rows[key]["ms"] > 0 and 0 < rows[key]["limit_ms"]
    assert abs(sum(row["share"] for row in rows.values()) - 1) < 1e-9
    events = json.loads((out / "trace-rank0.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("fastbeit: update") == 2
    assert (out / "profile.txt").read_text() in done.stdout


def test_wrong_flags_are_refused(images, tmp_path) -> None:
    done = profiled(tmp_path, images, "--profile-steps=0", code=2)
    assert "--profile-steps must be at least 1, got 0" in done.stderr
    done = profiled(tmp_path, images, "--plan", code=2)
    assert "--plan goes with fastbeit.pretrain" in done.stderr
