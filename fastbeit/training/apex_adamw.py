"""NVIDIA apex's FusedAdam behind the interface of PyTorch's fused AdamW (``--optimizer apex``).

FusedAdam knows neither sharded tensors nor a scale and a skip that stay on the device. Here it
works on each rank's shards, gradients are scaled in one extra pass, and whether to skip is read
back: one host sync a step. State has AdamW's names and shapes, so checkpoints are interchangeable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbeit import environment
from fastbeit.training.distributed import local_shard


def load_fused_adam() -> Any:
    """The class ``apex.optimizers.FusedAdam``.

    Raises:
        ValueError: apex is absent, is the unrelated package of that name, or lacks its CUDA part.
    """
    found = environment.apex()
    if not found.usable:
        raise ValueError(
            f"--optimizer apex was asked for, but {found}; use --optimizer adamw, which is "
            "PyTorch's fused AdamW"
        )
    from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

    return FusedAdam


class ApexAdamW(torch.optim.Optimizer):
    """AdamW by FusedAdam over plain or FSDP2-sharded parameters.

    Args:
        groups: from :func:`~fastbeit.training.optimizer.param_groups`.
        lr, betas, eps: as for ``torch.optim.AdamW``.

    ``grad_scale`` and ``found_inf`` are set before each step, as for the fused AdamW: gradients are
    divided by the first; with the second at 1 nothing moves.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        fused_adam = load_fused_adam()
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        shards = [
            {**group, "params": [nn.Parameter(local_shard(p.detach())) for p in group["params"]]}
            for group in self.param_groups
        ]
        self._fused = fused_adam(shards, lr=lr, betas=betas, eps=eps, adam_w_mode=True)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        """One update."""
        if closure is not None:
            raise ValueError("ApexAdamW takes no closure: compute gradients before step()")
        if self.found_inf is not None and bool(self.found_inf):  # host sync
            return
        for group, fused_group in zip(self.param_groups, self._fused.param_groups, strict=True):
            fused_group["lr"] = group["lr"]
            for parameter, shard in zip(group["params"], fused_group["params"], strict=True):
                shard.grad = None if parameter.grad is None else local_shard(parameter.grad)
                state = self.state[parameter]
                self._fused.state[shard] = {
                    name: local_shard(state[name]) for name in ("exp_avg", "exp_avg_sq")
                }
                state["step"] += 1
            gradients = [p.grad for p in fused_group["params"] if p.grad is not None]
            if self.grad_scale is not None:
                torch._foreach_div_(gradients, self.grad_scale)
            # FusedAdam counts steps by group and adds one itself; the tensor on the CPU is ours.
            fused_group["step"] = int(self.state[group["params"][0]]["step"]) - 1
        self._fused.step()
