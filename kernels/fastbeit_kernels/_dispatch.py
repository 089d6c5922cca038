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
SHOWN_ON_A_GPU: frozenset[str] = frozenset(
    {
        "attention",
        "attention_packed",
        "expand_rel_pos_bias",
        "rel_pos_attention",
        "rel_pos_attention_packed",
        "scale_residual_layer_norm",
        "bias_gelu",
        "masked_linear_cross_entropy",
        "linear_argmax",
        "embed_patches",
        "conv2d_channels_last",
        "conv2d_pointwise_channels_last",
    }
)
"""Public functions of which "auto" takes the kernels. A name comes here when ``python -m
benchmarks.gpu`` has shown that its kernels are right on a device and ahead of the best alternative;
until then they are asked for by name. What was shown where: docs/decisions/0011-shown-on-a-gpu.md.
"""
SHOWN_CAPABILITIES = frozenset({(9, 0)})
"""Of the GPUs that have shown it (an H200). On others "auto" takes the reference."""

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


def not_shown(device_type: str, device_index: int) -> str | None:
    """Why "auto" takes no kernel on a device that can run them; None where it does."""
    if device_type != "cuda":
        return "Triton's kernels are for GPUs"
    capability = torch.cuda.get_device_capability(device_index)
    if capability in SHOWN_CAPABILITIES:
        return None
    shown = ", ".join(f"{major}.{minor}" for major, minor in sorted(SHOWN_CAPABILITIES))
    return (
        f"no GPU of compute capability {capability[0]}.{capability[1]} has shown them right and "
        f"faster yet, only of {shown}"
    )


not_shown._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; make it the tensor's."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def _timed(operation: str, tensor: Tensor) -> bool:
    """Whether it was shown with such tensors: a relative table in fp32, all else in 16 bits. In
    fp32 convolutions lose to cuDNN, and nothing else was timed."""
    if operation not in SHOWN_ON_A_GPU:
        return False
    if operation == "expand_rel_pos_bias":
        return tensor.dtype == torch.float32
    return tensor.dtype == torch.bfloat16 or tensor.dtype == torch.float16


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
        and (unfit is not None or tensor.device.type == "cpu" or not _timed(operation, tensor))
    ):
        return "reference"
    device = tensor.device
    index = device.index if device.index is not None else 0
    reason = why_not(device.type, index)
    if impl == "auto":
        shown = reason is None and not_shown(device.type, index) is None
        return "triton" if shown else "reference"
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
