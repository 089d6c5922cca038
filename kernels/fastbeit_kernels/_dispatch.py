"""Which implementation a call takes. Imports no Triton, and asks for no GPU before a tensor on one
comes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from ._checks import check_impl_name

OLDEST_CAPABILITY = (8, 0)
SHOWN_ON_A_GPU: frozenset[str] = frozenset()
"""Public functions of which "auto" takes the kernels. A name comes here when ``python -m
benchmarks.gpu`` has shown that its kernels are right on a device and ahead of the best alternative;
until then they are asked for by name."""

Impl = Literal["auto", "triton", "reference"]


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


# The compiler is to take the answer as it is, not to trace how it was found. This is what
# torch.compiler.assume_constant_result does too, but it imports the whole compiler, and so Triton.
why_not._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make it the tensor's."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def choose(
    operation: str, impl: str, tensor: Tensor, unfit: str | None = None
) -> Literal["triton", "reference"]:
    """What runs ``operation`` on ``tensor``'s device.

    Args:
        unfit: why these arguments can't go to the kernels (a dtype or size they don't have), or
            None. ``"auto"`` then takes the reference; ``"triton"`` is refused with ValueError.
    """
    check_impl_name(operation, impl)
    if impl == "reference" or (
        impl == "auto"
        and (operation not in SHOWN_ON_A_GPU or unfit is not None or tensor.device.type == "cpu")
    ):
        return "reference"
    device = tensor.device
    index = device.index if device.index is not None else 0
    reason = why_not(device.type, index)
    if impl == "auto":
        return "triton" if reason is None else "reference"
    if reason is not None:
        raise RuntimeError(
            f"{operation}: impl='triton' was asked for, but {reason}; use impl='auto' or "
            "impl='reference'"
        )
    if unfit is not None:
        raise ValueError(
            f"{operation}: impl='triton' was asked for, but {unfit}; use impl='auto' or "
            "impl='reference'"
        )
    return "triton"
