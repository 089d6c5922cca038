"""What this machine offers: one :class:`Finding` a part, each found without importing that part.

    from fastbeit.environment import dali, apex
    if not dali().usable: print(dali())

``python -m fastbeit.doctor`` prints all of them; code that needs one optional part asks for it
here, so that every message about a missing part reads the same. Importing this module queries
nothing; each function does when it is called.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Literal

from fastbeit import hardware

TESTED_PYTHONS = ((3, 11), (3, 12), (3, 13))


@dataclass(frozen=True)
class Finding:
    """One line about one part.

    Attributes:
        name: the part.
        state: ``ok``; ``absent``: not there, and nothing is wrong with that; ``problem``: there but
            unusable, or missing and needed.
        text: what was found, with its version.
        advice: what to do, empty when there is nothing to do.
    """

    name: str
    state: Literal["ok", "absent", "problem"]
    text: str
    advice: str = ""

    @property
    def usable(self) -> bool:
        """Whether the part can be used as it is."""
        return self.state == "ok"

    def __str__(self) -> str:
        line = f"{self.state:<8}{self.name:<13}{self.text}"
        return f"{line}; {self.advice}" if self.advice else line


def find_module(name: str) -> ModuleSpec | None:
    """The spec of a module, or None, also where a parent package is missing or broken."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def dali_builds() -> dict[str, str]:
    """Name and version of every installed distribution called nvidia-dali-something."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith("nvidia-dali"):
            found.setdefault(name, distribution.version)
    return found


@functools.cache
def import_error(module: str) -> str | None:
    """Import a module in another process: None where that works, else the error's last line."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def python() -> Finding:
    """The interpreter."""
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] in TESTED_PYTHONS:
        return Finding("python", "ok", text)
    return Finding("python", "problem", text, "fastbeit is tried on Python 3.11 to 3.13; use one")


def library(name: str, *, why: str = "") -> Finding:
    """A plain dependency or extra, by its distribution's name; ``why`` is shown when absent."""
    found = version_of(name)
    if found is not None:
        return Finding(name, "ok", found)
    if why:
        return Finding(name, "absent", "not installed", why)
    return Finding(name, "problem", "not installed", f"pip install {name}")


def nvidia_driver() -> str | None:
    """Version of the NVIDIA kernel driver (``present`` where it is hidden), None without one."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
        return next((word for word in words if word[:1].isdigit() and "." in word), "present")
    except OSError:
        pass
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def gpu() -> Finding:
    """CUDA GPUs as torch sees them, and why it sees none where a driver is present."""
    if find_module("torch") is None:
        return Finding("gpu", "problem", "can't be looked for without torch", "pip install torch")
    import torch

    driver = nvidia_driver()
    if torch.cuda.is_available():
        first = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        text = (
            f"{count} × {first.name}, {first.total_memory / 2**30:.0f} GiB, "
            f"SM {first.major}.{first.minor}, driver {driver or 'unknown'}, "
            f"CUDA {torch.version.cuda or 'unknown'}"
        )
        return Finding("gpu", "ok", text)
    if driver is None:
        return Finding("gpu", "absent", "no NVIDIA driver; training runs on the CPU")
    if torch.version.cuda is None:
        return Finding(
            "gpu",
            "problem",
            f"driver {driver}, but torch {torch.__version__} is a build without CUDA",
            "install torch's CUDA build",
        )
    return Finding(
        "gpu",
        "problem",
        f"driver {driver}, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU",
        "update the driver, or check CUDA_VISIBLE_DEVICES and the container's GPU flags",
    )


def cpu_bf16() -> str | None:
    """The CPU's instructions for bf16 matrix products, in words; None where it has none."""
    features = hardware.cpu_features()
    for feature, words in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512"), ("bf16", "Arm bf16")):
        if feature in features:
            return words
    return None


def precision() -> Finding:
    """Whether bf16, the default, is fast here."""
    if gpu().usable:
        import torch

        major, minor = torch.cuda.get_device_capability(0)
        if major >= 8:
            return Finding("precision", "ok", f"bf16 tensor cores (SM {major}.{minor})")
        return Finding(
            "precision",
            "problem",
            f"SM {major}.{minor} has no bf16 tensor cores",
            "use --precision fp32, or a GPU of SM 8.0 or later",
        )
    if (words := cpu_bf16()) is not None:
        return Finding("precision", "ok", f"bf16 matrix products on the CPU ({words})")
    return Finding(
        "precision",
        "absent",
        "this CPU has no bf16 matrix products; bf16 works but is emulated",
        "--precision fp32 is likely faster here",
    )


def triton() -> Finding:
    """Triton, which GPU kernels need; without it the PyTorch reference runs."""
    if find_module("triton") is not None:
        return Finding("triton", "ok", version_of("triton") or "version unknown")
    return Finding("triton", "absent", "not installed; fastbeit_kernels runs its PyTorch reference")


def dali() -> Finding:
    """NVIDIA DALI, told apart from the empty packages that share its name."""
    builds = dali_builds()
    if find_module("nvidia.dali") is not None:
        named = ", ".join(f"{name} {version}" for name, version in sorted(builds.items()))
        if len([name for name in builds if name.startswith("nvidia-dali-cuda")]) > 1:
            return Finding(
                "dali",
                "problem",
                f"two builds share one import package: {named}",
                "uninstall both, then install the one for your CUDA",
            )
        return Finding("dali", "ok", named or "importable, no package metadata")
    remedy = 'pip install "fastbeit[gpu]" (CUDA 13) or "fastbeit[cuda12]"'
    if builds:
        named = ", ".join(f"{name} {version}" for name, version in sorted(builds.items()))
        return Finding(
            "dali",
            "problem",
            f"{named} is a placeholder package: it holds no nvidia.dali",
            f"pip uninstall {' '.join(sorted(builds))}, then {remedy}",
        )
    if sys.platform != "linux":
        return Finding("dali", "absent", "not made for this system; the reference loader runs")
    return Finding("dali", "absent", "not installed; the reference loader runs", remedy)


def apex() -> Finding:
    """NVIDIA's apex with FusedAdam, told apart from the unrelated `apex` of the package index.

    Nothing of the found package is executed: the impostor imports a web framework.
    """
    spec = find_module("apex")
    if spec is None:
        return Finding("apex", "absent", "not installed; PyTorch's fused AdamW is the default")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    has_fused_adam = any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders)
    version = version_of("apex") or "of unknown version"
    source = "build NVIDIA's apex from its source (github.com/NVIDIA/apex), or use adamw"
    if not has_fused_adam:
        return Finding(
            "apex",
            "problem",
            f"apex {version} is not NVIDIA's: it has no apex.optimizers.FusedAdam "
            "(`pip install apex` brings a toolkit for the Pyramid web framework)",
            f"pip uninstall apex; {source}",
        )
    if find_module("amp_C") is None:
        return Finding(
            "apex",
            "problem",
            f"apex {version} was built without its CUDA extensions (no amp_C)",
            source,
        )
    return Finding("apex", "ok", f"{version}, FusedAdam and amp_C present")


def xformers() -> Finding:
    """xformers, for ``--attention xformers`` on a GPU and as a baseline in benchmarks."""
    version = version_of("xformers")
    if version is None:
        return Finding("xformers", "absent", "not installed; nothing needs it")
    return Finding("xformers", "ok", f"{version}; for --attention xformers")
