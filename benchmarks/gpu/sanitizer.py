"""compute-sanitizer over small cases of each operation: bad addresses (memcheck), races in shared
memory (racecheck).

PyTorch's caching allocator is switched off for it, so that each tensor is an allocation of its own
and an access beyond its end is one beyond what the driver knows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.operations import OPERATIONS

TOOLS = ("memcheck", "racecheck")
SANITIZED_CASES = tuple(case.name for op in OPERATIONS for case in op.cases if case.sanitized)
CASES_TEXT = ", ".join(SANITIZED_CASES)
FOUND = 77
AFTERWARDS_S = 15.0
"""They may go on for so long when the checks beside them are done."""
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")

Row = dict[str, Any]


def find_tool() -> str | None:
    """compute-sanitizer on the PATH or where CUDA puts it."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *PLACES]))


def start(tool: str, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    task = {"kind": "once", "cases": SANITIZED_CASES, "dtype": "bfloat16", "dry": False}
    name = find_tool()
    assert name is not None
    with log.open("wb") as output:
        return subprocess.Popen(
            [
                name,
                "--tool",
                tool,
                "--error-exitcode",
                str(FOUND),
                # Calls of libraries that fail and are handled, such as probing for a context.
                *(("--report-api-errors", "no") if tool == "memcheck" else ()),
                sys.executable,
                "-c",
                "from benchmarks.gpu.tasks import sanitizer_main; sanitizer_main()",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                **environment,
                "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
                "FASTBEIT_SANITIZED_TASK": json.dumps(task),
            },
            start_new_session=True,
        )


def verdict(tool: str, code: int | None, text: str) -> Row:
    """A row from how it ended. A tool that refuses the device is no verdict on the kernels."""
    summary = [line.strip("= \n") for line in text.splitlines() if "SUMMARY" in line]
    row: Row = {
        "kind": "sanitizer",
        "tool": tool,
        "case": CASES_TEXT,
        "summary": "; ".join(summary),
    }
    if code is None:
        return {**row, "status": "not finished", "reason": "out of time"}
    if "Device not supported" in text or "Unable to find injection" in text:
        return {**row, "status": "unavailable", "reason": "the tool does not support this device"}
    if code == 0:
        return {**row, "status": "pass", "reason": ""}
    if code == FOUND:
        details = [line.strip("= ") for line in text.splitlines() if line.startswith("=========")]
        return {**row, "status": "fail", "reason": " | ".join(details[:12])[:1500]}
    return {**row, "status": "unavailable", "reason": f"exit code {code}: {text[-400:]}"}


def run_beside(
    folder: Path, environment: dict[str, str], meanwhile: Callable[[], None], limit_s: float
) -> list[Row]:
    """Start the tools, do ``meanwhile`` (the correctness checks), then collect their verdicts."""
    if find_tool() is None:
        meanwhile()
        reason = "compute-sanitizer was not found on the PATH or beside CUDA"
        return [
            {
                "kind": "sanitizer",
                "tool": tool,
                "case": "",
                "status": "unavailable",
                "reason": reason,
            }
            for tool in TOOLS
        ]
    until = time.monotonic() + limit_s
    started = []
    try:
        for tool in TOOLS:
            log = folder / f"{tool}.log"
            started.append((tool, log, start(tool, log, environment)))
        meanwhile()
        until = min(until, time.monotonic() + AFTERWARDS_S)
        rows = []
        for tool, log, process in started:
            code = None
            try:
                code = process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            rows.append(verdict(tool, code, log.read_text(errors="replace")))
        return rows
    finally:
        for *_, process in started:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
