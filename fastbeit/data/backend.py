"""Which loader runs, and why: one line for the log, or an error that names the remedy."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

import torch

BACKENDS = ("auto", "dali", "reference")
HW_DECODER_LOAD = 0.65
"""Share of the JPEGs for a GPU's hardware decoder: DALI's own default."""
_INSTALL = 'pip install "fastbeit[gpu]"'


def choose_backend(backend: str, device: torch.device) -> tuple[str, str]:
    """("dali" or "reference", the reason in one line).

    Raises:
        ValueError: an unknown name.
        RuntimeError: "dali" was asked for by name and can't run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return "reference", "reference loader (PIL): asked for"
    problem = dali_problem()
    if backend == "dali":
        if problem is not None:
            raise RuntimeError(f"the DALI loader was asked for, but {problem}")
        return "dali", "DALI loader: asked for"
    if device.type != "cuda":
        return "reference", "reference loader (PIL): on a CPU it is faster than DALI, as measured"
    if problem is not None:
        return "reference", f"reference loader (PIL): {problem}"
    return "dali", "DALI loader: the device is a GPU, which decodes and resizes there"


def dali_problem() -> str | None:
    """Why DALI can't be used, with the remedy; None when it is installed."""
    try:
        if find_spec("nvidia.dali") is not None:
            return None
    except ImportError:  # no package nvidia at all
        pass
    placeholder = _placeholder()
    if placeholder is not None:
        return (
            f"only {placeholder} is installed, an empty placeholder on PyPI, not DALI itself "
            f"(the real packages are nvidia-dali-cuda120 and nvidia-dali-cuda130): "
            f"pip uninstall {placeholder}, then {_INSTALL}"
        )
    return f"NVIDIA DALI is not installed: {_INSTALL}"


def _placeholder() -> str | None:
    """A PyPI package whose name suggests DALI and that holds none."""
    for name in ("nvidia-dali", "nvidia-dali-cuda"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name
    return None
