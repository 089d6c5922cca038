"""Where Triton can run. Imports no Triton, and asks for no GPU before a tensor on one comes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result
def why_not(device_type: str, device_index: int) -> str | None:
    """Why Triton's kernels can't run on a device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu":
        # Triton reads the variable when kernels are defined; so do we.
        if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
            return None
        return "the tensors are on the CPU, where Triton runs only with TRITON_INTERPRET=1"
    if device_type != "cuda" or torch.version.cuda is None:
        return f"the kernels are for NVIDIA GPUs, and the tensors are on {device_type}"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < OLDEST_CAPABILITY:
        return (
            f"the kernels need compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} "
            f"or newer, and this GPU has {capability[0]}.{capability[1]}"
        )
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make it the tensor's."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
