"""Where a result comes from: GPU, driver, clocks, versions, source, command; and its ceilings."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.timing import Limits, Timer, interleave

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "xformers",
    "transformer_engine",
    "flash_attn",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "apex",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
)
SMI_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "persistence_mode",
    "mig.mode.current",
)

MEASURED = ("fastbeit", "kernels", "benchmarks")
"""Folders whose code a result depends on."""

Row = dict[str, Any]


def of_host(command: list[str], dry: bool) -> Row:
    """Needs no device. Variables that steer the libraries are part of it."""
    prefixes = ("TRITON_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "CUDA_", "NVTE_", "CUBLAS_")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "dry_run": dry,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "cuda_of_torch": torch.version.cuda,
        "commit": commit(),
        "source_sha256": source_hash(),
        "variables": {
            name: _last_part(value)
            for name, value in os.environ.items()
            if name.startswith(prefixes)
        },
        "nvidia_smi": nvidia_smi(),
    }


def _last_part(value: str) -> str:
    """A folder by its last name: which one it is on this machine is nobody's business."""
    return ".../" + value.rstrip("/").rsplit("/", 1)[-1] if value.startswith("/") else value


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None outside a checkout."""
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = run("status", "--porcelain", "--", *MEASURED, ":!benchmarks/results")
        return run("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def source_hash() -> str:
    """Over the sources: what was measured, wherever the checkout came from."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def nvidia_smi() -> dict[str, str] | None:
    """Clocks, power and modes as found; nothing is ever set."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(SMI_FIELDS, values, strict=False))


def of_device(device: torch.device) -> Row:
    if device.type != "cuda":
        return {"gpu": None, "note": "dry run on the CPU: its times mean nothing"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
    }


def ceilings(device: torch.device, timer: Timer) -> Row:
    """What the device reaches at its best: a large bf16 product and a large copy, random data."""
    cuda = device.type == "cuda"
    side, copied = (8192, 2**30) if cuda else (64, 2**12)
    if cuda and torch.cuda.get_device_properties(device).total_memory < 12e9:
        side, copied = 4096, 2**28
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    stats = interleave(
        {
            "product": [lambda: left @ right] * 3,
            "copy": [lambda: target.copy_(source)] * 3,
        },
        timer,
        Limits(seconds=1.5, least_rounds=3, most_rounds=30),
    )
    measured = {
        "tflops": 2 * side**3 / stats["product"].ms / 1e9,
        "tb_per_s": 2 * copied / stats["copy"].ms / 1e9,
        "source": f"measured: bf16 product of {side}, copy of {copied // 2**20} MiB",
    }
    name = torch.cuda.get_device_name(device) if cuda else ""
    sheet = roofline.data_sheet_ceiling(name)
    return {
        **measured,
        "data_sheet_tflops": None if sheet is None else sheet.tflops,
        "data_sheet_tb_per_s": None if sheet is None else sheet.tb_per_s,
    }
