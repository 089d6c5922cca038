"""A pass of `python -m fastbeit_kernels.tune` in what time is left; it prints to tuning.txt."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

LEAST_S = 30.0
MODULE = "fastbeit_kernels.tune"


def tune(folder: Path, seconds: float, environment: dict[str, str], dry: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": "tuning", "task": MODULE}
    if importlib.util.find_spec(MODULE) is None:
        return {**row, "status": "unavailable", "reason": f"there is no {MODULE}"}
    if dry:
        return {**row, "status": "skipped", "reason": "a dry run has nothing to measure"}
    if seconds < LEAST_S:
        return {**row, "status": "skipped", "reason": f"{max(seconds, 0):.0f} s were left"}
    output = folder / "tuning.txt"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {
                **row,
                "status": "cut short",
                "reason": f"stopped after {seconds:.0f} s; "
                "what it printed until then is in tuning.txt",
            }
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    status = "ok" if code == 0 else "failed"
    return {**row, "status": status, "reason": f"exit code {code}, output in tuning.txt"}
