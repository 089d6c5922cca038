"""AdamW for BEiT: which parameters decay, the layer-wise learning rates, and the implementation.

The update is PyTorch's fused AdamW. Its ``grad_scale`` and ``found_inf`` inputs (made for loss
scaling) carry the gradient clip and the skip of a non-finite step, so that neither costs a pass
over the gradients or a wait for the device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastbeit.training.config import OptimizerConfig

NEVER_DECAYED = frozenset({"cls_token", "pos_embed"})


def _layer_id(name: str, depth: int) -> int:
    """0 for embeddings and tokens, i + 1 for block i, depth + 1 for everything else."""
    if name in {"cls_token", "mask_token", "pos_embed"} or name.startswith("patch_embed."):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block.group(1)) + 1 if block else depth + 1


def param_groups(
    model: nn.Module, *, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups of ``model``'s trainable parameters.

    One-dimensional parameters, ``*.bias``, ``cls_token`` and ``pos_embed`` are not decayed; the
    mask token, the relative-position table and every weight matrix are. With ``layer_decay`` the
    learning rate of layer ``i`` is scaled by ``layer_decay ** (depth + 1 - i)`` (BEiT's
    fine-tuning: 0.65 for the base model), embeddings being layer 0, block ``b`` layer ``b + 1``.

    Returns:
        Dicts with ``params`` (list of Parameter), ``names``, ``weight_decay`` and ``lr_scale``, to
        be multiplied into the scheduled learning rate.

    Raises:
        ValueError: when ``layer_decay`` is not in (0, 1], or is asked of a model without blocks.
    """
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")
    depth = len(getattr(model, "blocks", ()))
    if layer_decay is not None and depth == 0:
        raise ValueError(f"layer_decay needs a model with blocks, {type(model).__name__} has none")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kept = parameter.ndim == 1 or name.endswith(".bias") or name in NEVER_DECAYED
        decay = 0.0 if kept else weight_decay
        scale = 1.0 if layer_decay is None else layer_decay ** (depth + 1 - _layer_id(name, depth))
        group = groups.setdefault(
            (scale, decay), {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer ``config`` asks for, over ``model``'s parameters (plain or FSDP2-sharded).

    Raises:
        RuntimeError: ``optimizer="apex"`` where NVIDIA's apex is not installed; the message tells
            the unrelated package of that name on PyPI from a build that lacks its CUDA extension.
    """
    groups = param_groups(model, weight_decay=config.weight_decay)
    if config.optimizer == "apex":
        from fastbeit.training.apex_adamw import ApexAdamW

        return ApexAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let a fused AdamW be captured in a CUDA graph: learning rates become tensors on ``device``.

    They are float32 then, which moves the update's rounding: 6e-8 of the learning rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)
        group["capturable"] = True


def scaled_step(optimizer: torch.optim.Optimizer, grad_scale: Tensor, skip: Tensor) -> None:
    """One update with every gradient divided by ``grad_scale``, or none where ``skip`` is 1.

    Args:
        optimizer: a fused AdamW (or ApexAdamW).
        grad_scale: float32 scalar on the parameters' device.
        skip: float32 scalar, 0 or 1; at 1 neither parameters nor moments nor step counts move.
    """
    optimizer.grad_scale = grad_scale  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as named tensors (``NAME.exp_avg`` ...), made first where no step was taken.

    The tensors are the live ones: a checkpoint can be loaded into them in place.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(optimizer.param_groups):
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensors[f"{name}.{key}"] = state[key]
    return tensors


def _named(groups: Iterable[dict[str, Any]]) -> Iterable[tuple[str, nn.Parameter]]:
    for group in groups:
        yield from zip(group["names"], group["params"], strict=True)
