"""The suites that say what kernels are for: whole steps, the tokenizer, the loader, pre-training.

They run as `pytest benchmarks/FILE ... --benchmark-only --record=...` in one process, the most
important file first, and record into the folder `suites` of the run, row by row: what they had
not come to when their time was up is missing, and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT
from benchmarks.suite_rows import NESTED

Row = dict[str, Any]

FILES = ("test_tokenizer.py", "test_step.py", "test_model.py", "test_loader.py", "test_pretrain.py")
"""In order of worth; the tokenizer's are few and short."""
NEEDED = ("pytest", "pytest_benchmark", "pytest_timeout", "safetensors", "PIL", "rich")
"""What they and fastbeit import; tyro is for flags, and they pass none."""
LEAST_S = 20.0
ENDING_S = 8.0
TINY = {"FASTBEIT_BENCH_TINY": "1"}


def chosen(only: list[str]) -> list[str]:
    """Of `FILES`, those that are named in ``only``; all where nothing is."""
    if not only:
        return list(FILES)
    return [name for name in FILES if name in only]


def run_suites(
    folder: Path, seconds: float, environment: dict[str, str], only: list[str], dry: bool
) -> Row:
    """Run them for ``seconds`` at most; a row about how that went."""
    files = chosen(only)
    row: Row = {"kind": "suites", "task": ", ".join(files) or "suites"}
    if not files:
        return {**row, "status": "skipped", "reason": "--only names none of them"}
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        reason = f"not installed: {', '.join(lacking)}"
        return {**row, "status": "unavailable", "reason": reason}
    if seconds < LEAST_S:
        return {**row, "status": "skipped", "reason": f"{max(seconds, 0):.0f} s were left"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(ROOT / "benchmarks" / name) for name in files]
    command += ["--benchmark-only", f"--record={folder / NESTED}"]
    with (folder / "suites.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            # The suites choose kernels themselves: nothing is to be interpreted for them.
            env={**os.environ, **environment, "TRITON_INTERPRET": "0", **(TINY if dry else {})},
            start_new_session=True,
        )
        try:
            code = process.wait(max(seconds - ENDING_S, 0.1))
        except subprocess.TimeoutExpired:
            # Asked to stop, pytest writes the summary of what there is.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_S)
            reason = f"stopped after {seconds:.0f} s; its rows until then are in {NESTED}/"
            return {**row, "status": "cut short", "reason": reason}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    status = "ok" if code == 0 else "failed"
    return {**row, "status": status, "reason": f"exit code {code}; rows in {NESTED}/"}
