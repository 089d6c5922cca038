"""Where the suites' results come from: hardware, threads, load, versions, source, command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import measured
from benchmarks.gpu.environment import of_device, of_host, version_of
from benchmarks.results import ROOT
from benchmarks.steps.problem import TINY_VARIABLE
from benchmarks.suite import DEVICE
from fastbeit import hardware
from fastbeit.environment import dali_builds

Row = dict[str, Any]
PACKAGES = ("torchvision", "timm", "transformers", "pillow", "pytest-benchmark")
# Of a CPU's many flags, those that matrix products and image codecs ask for.
FEATURES = ("avx", "amx", "fma", "f16c", "sse4", "asimd", "sve", "bf16", "i8mm")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", TINY_VARIABLE)


def describe(words: Sequence[str]) -> Row:
    """The environment of a run that starts now; ``words`` are pytest's arguments."""
    host = of_host(["python", "-m", "pytest", *map(shareable, words)], dry=False)
    del host["dry_run"]
    packages = {name: version_of(name) for name in PACKAGES} | dali_builds()
    gpu = of_device(torch.device("cuda")) if DEVICE == "cuda" else None
    features = [flag for flag in sorted(hardware.cpu_features()) if flag.startswith(FEATURES)]
    return {
        "kind": "suites",
        **host,
        "dirty": None if host["commit"] is None else host["commit"].endswith("+"),
        "device": hardware.cpu_name() if gpu is None else gpu["gpu"],
        "gpu_properties": gpu,
        "cpu": {
            "name": hardware.cpu_name(),
            "features": features,
            "usable_cores": hardware.usable_cores(),
            "physical_cores": hardware.physical_cores(),
        },
        "threads": torch.get_num_threads(),
        "memory_bytes": hardware.memory_bytes(),
        "packages": {**host["packages"], **packages},
        "variables": host["variables"]
        | {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "load_at_start": load(),
        "ended": None,
    }


def at_end() -> Row:
    """What is known when the last row is: a run without ``ended`` was cut short."""
    return {
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_at_end": load(),
        "ceilings": measured(),
    }


def load() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes; the benchmarks themselves are part of them."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except OSError:
        return None


def shareable(word: str) -> str:
    """An argument as it may be published: of a path outside the checkout only the last name."""
    name, equals, value = word.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    inside = path.is_relative_to(ROOT)
    return f"{name}{equals}{path.relative_to(ROOT) if inside else path.name}"
