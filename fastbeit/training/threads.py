"""Threads of a process that computes on the CPU: its share of the machine's cores.

torchrun starts several processes with OMP_NUM_THREADS=1, whatever the machine has; a container's
PyTorch counts the host's cores, whatever it was granted. What the user set stays.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastbeit import hardware

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def settle_threads(device: torch.device, local_size: int) -> str:
    """Set this process's threads for a CPU; says by what rule, empty on a GPU.

    Args:
        local_size: processes of the run on this machine.
    """
    if device.type != "cpu":
        return ""
    asked = [name for name in SETTINGS if name in os.environ]
    if asked and not (asked == ["OMP_NUM_THREADS"] and _torchruns_own()):
        return f"as {asked[0]} says"
    cores = hardware.physical_cores()
    torch.set_num_threads(max(1, int(cores) // local_size))
    return f"{cores:g} physical cores for {local_size} process{'es' * (local_size > 1)}"


def _torchruns_own() -> bool:
    """Whether OMP_NUM_THREADS came from torchrun: it was started without. False where unknown."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:  # what a process was started with; its later changes don't show
        words = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(word.startswith(b"OMP_NUM_THREADS=") for word in words)
