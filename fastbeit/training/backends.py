"""Which implementations a run takes, settled and tried before anything is loaded.

    backends, notes = settle_backends(config, device)

The notes say what runs the model's operations, and why. What was asked for by name and can't run
is an error here, not a fall-back later.
"""

from __future__ import annotations

import torch

from fastbeit.model import Backends, BeitConfig
from fastbeit.model.attention_backends import attend
from fastbeit.model.backends import AttentionName
from fastbeit.training.config import PretrainConfig
from fastbeit.training.setup import DTYPES
from fastbeit_kernels import SHOWN_ON_A_GPU, not_shown, why_not

OPERATIONS = (
    "attention",
    "attention_packed",
    "bias_gelu",
    "embed_patches",
    "expand_rel_pos_bias",
    "masked_linear_cross_entropy",
    "scale_residual_layer_norm",
)
"""Public functions of ``fastbeit_kernels`` that a step of the student calls."""


def settle_backends(config: PretrainConfig, device: torch.device) -> tuple[Backends, list[str]]:
    """What the model is built with, and one line each about kernels and attention.

    Args:
        config: with its precision settled.
        device: where the student runs.

    Raises:
        ValueError: an implementation asked for by name can't run a training step here.
    """
    run = config.run
    cant = why_not(device.type, device.index or 0)
    if run.kernels == "triton" and cant is not None:
        raise ValueError(
            f"--kernels triton was asked for, but {cant}; use --kernels auto or reference"
        )
    if run.attention not in ("auto", "reference"):
        try_attention(run.attention, config.model, device, DTYPES[run.precision])
    attention = f"{run.attention}, asked for by name"
    if run.attention == "auto":
        attention = "as the kernels" if run.kernels == "auto" else f"{run.kernels}, as the kernels"
    note = kernels_note(run.kernels, device, run.precision)
    notes = [f"kernels: {note}", f"attention: {attention}"]
    return Backends(run.kernels, run.attention), notes


def kernels_note(asked: str, device: torch.device, precision: str) -> str:
    """What ``--kernels`` means on a device for the operations of a student's step, and why."""
    if asked != "auto":
        return f"{asked}, asked for by name"
    if device.type == "cpu":
        return "reference (PyTorch; Triton's kernels are for GPUs)"
    if (cant := why_not(device.type, device.index or 0)) is not None:
        return f"reference ({cant})"
    if (unseen := not_shown(device.type, device.index or 0)) is not None:
        return f"reference ({unseen}; --kernels triton takes them)"
    if precision == "fp32":
        return "reference (the kernels are shown right and faster in 16 bits; --kernels triton)"
    shown = [name for name in OPERATIONS if name in SHOWN_ON_A_GPU]
    others = [name for name in OPERATIONS if name not in SHOWN_ON_A_GPU]
    reason = "no kernel of them has been shown right and faster on a GPU yet; --kernels triton"
    if not shown:
        return f"reference ({reason} takes them)"
    rest = f"; reference for {', '.join(others)} ({reason} takes all)" if others else ""
    return f"triton for {', '.join(shown)} (shown right and faster on a GPU){rest}"


def try_attention(
    name: AttentionName, model: BeitConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Attention of ``model`` on two images, forward and backward, on all queries and on two.

    Raises:
        ValueError: the backend refuses it: a module is missing, a device or a dtype not meant for
            it, no gradient for a trained bias.
    """

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)

    tokens, heads = model.tokens, model.heads
    relative = model.position in ("relative", "relative_per_block")
    try:
        for positions in (None, torch.tensor([[0, 1], [1, -1]], device=device)):
            queries = tokens if positions is None else positions.shape[1]
            q, k, v = (
                zeros(2, rows, heads, model.head_width) for rows in (queries, tokens, tokens)
            )
            bias = zeros(heads, tokens, tokens, dtype=torch.float32) if relative else None
            attend(name, q, k, v, bias, query_positions=positions).sum().backward()
            if bias is not None and bias.grad is None:
                raise RuntimeError("it gives a trained bias no gradient")
    except Exception as error:  # a library may refuse with any
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"--attention {name} can't take a training step on {device.type} in "
            f"{str(dtype).removeprefix('torch.')}: {reason}; use --attention auto"
        ) from error
