"""CPU, memory and disk as this process may use them: containers often grant less than they show.

Linux's ``/proc`` and cgroup files are read where they exist; elsewhere the standard library
answers.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")
CPUS = Path("/sys/devices/system/cpu")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def usable_cores() -> float:
    """Cores this process may use: its affinity, cut by a cgroup's CPU quota (fractions occur)."""
    try:
        cores = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # macOS and Windows have no affinity call
        cores = float(os.cpu_count() or 1)
    quota = _read(CGROUP / "cpu.max").split()  # cgroup 2: "max 100000" or "150000 100000"
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def physical_cores() -> float:
    """Cores this process may use, the two threads of one core counted once."""
    cores = usable_cores()
    try:
        numbers = os.sched_getaffinity(0)
    except AttributeError:
        return cores
    siblings = {
        _read(CPUS / f"cpu{number}" / "topology" / "thread_siblings_list") or str(number)
        for number in numbers
    }
    return min(cores, float(len(siblings)))


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, cut by a cgroup's limit. None where unknown."""
    limits = []
    for line in _read(PROC / "meminfo").splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    limit = _read(CGROUP / "memory.max").strip()  # cgroup 2: "max" or bytes
    if limit.isdigit():
        limits.append(int(limit))
    return min(limits) if limits else None


def shared_memory_bytes() -> int | None:
    """Size of ``/dev/shm``, through which worker processes hand over images. None where absent."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def free_disk_bytes(folder: Path) -> int:
    """Free space on the disk that holds ``folder``, or would hold it once made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@functools.cache
def cpu_features() -> frozenset[str]:
    """Instruction-set flags of the first CPU as ``/proc/cpuinfo`` names them (none elsewhere)."""
    for line in _read(PROC / "cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def cpu_name() -> str:
    """The CPU's marketing name, or the architecture where the system does not tell."""
    for line in _read(PROC / "cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
