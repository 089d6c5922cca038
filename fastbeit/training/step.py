"""One optimizer step: micro-batches in, one AdamW update out, no wait for the device.

The loss of a step is the mean over the masked tokens of the *global* batch, whose number K is only
known once every rank has drawn its masks. Each micro-batch therefore adds (sum of its losses) / S,
with S the mask slots of the global batch, a constant; the factor S / K, the gradient clip and the
skip of a non-finite step all go into the scale that the fused AdamW divides gradients by. One
all-reduce of four numbers carries losses, counts and the gradient norm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastbeit.batch import MimBatch
from fastbeit.training.distributed import World, local_shard
from fastbeit.training.optimizer import scaled_step

Tokenize = Callable[[MimBatch], Tensor]
"""``[B, M]`` int64 targets of a batch's masked positions."""


def phase(name: str) -> AbstractContextManager[object]:
    """A range that profilers show (``fastbeit.profile``); about a microsecond without one."""
    return torch.profiler.record_function(f"fastbeit: {name}")


class StepResult(NamedTuple):
    """Numbers of one step over the global batch, float64 scalars on the device.

    loss and accuracy are means over masked tokens; grad_norm is before clipping; skipped is 1 where
    the loss or the norm was not finite and nothing was updated.
    """

    loss: Tensor
    accuracy: Tensor
    count: Tensor
    grad_norm: Tensor
    skipped: Tensor


class TrainStep:
    """Runs optimizer steps of one model.

    Args:
        model: a BeitForMim after :func:`~fastbeit.training.distributed.place_model`.
        optimizer: from :func:`~fastbeit.training.optimizer.build_optimizer`.
        tokenize: targets of a micro-batch that brings none; runs without gradient.
        world: the ranks.
        slots: mask slots of the global batch, ``global_batch * M``.
        clip_norm: global norm that gradients are clipped to; 0 is off.
        copies, weights: of the model's :class:`~fastbeit.training.distributed.Placement`.
        observe: called with (targets, positions) of each micro-batch, on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenize: Tokenize,
        world: World,
        *,
        slots: int,
        clip_norm: float,
        copies: int = 1,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
        observe: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.tokenize = tokenize
        self.world = world
        self.slots = slots
        self.clip_norm = clip_norm
        self.copies = copies
        self.weights = weights
        self.observe = observe
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def run(self, micro_batches: Iterable[MimBatch], accumulation: int) -> StepResult:
        """One update from ``accumulation`` micro-batches."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(micro_batches, start=1):
            targets = self.targets(batch)
            sums += self.backward(batch, targets, last=number == accumulation)
        with phase("update"):
            return self.update(sums)

    def targets(self, batch: MimBatch) -> Tensor:
        """``[B, M]`` tokens of the masked patches, counted."""
        with phase("tokenize"), torch.no_grad():
            targets = self.tokenize(batch) if batch.targets is None else batch.targets
            if self.observe is not None:
                self.observe(targets, batch.positions)
        return targets

    def backward(self, batch: MimBatch, targets: Tensor, *, last: bool) -> Tensor:
        """Adds the gradients of one micro-batch; its (loss sum, correct, count), float64."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        with self.weights():
            with phase("forward"):
                out = self.model.loss(  # pyright: ignore[reportCallIssue]
                    batch.images, batch.positions, targets, drop_scale=batch.drop_scale
                )
                loss_sum = out.loss * out.count
                # FSDP averages gradients over ranks; times the number of ranks, that is a sum.
                share = loss_sum * (self.world.size / self.slots)
            with phase("backward"):
                share.backward()
        return torch.stack([loss_sum.detach().double(), out.correct.double(), out.count.double()])

    def update(self, sums: Tensor) -> StepResult:
        """One step of the optimizer; ``sums`` of all micro-batches' :meth:`backward`."""
        shards = [local_shard(p.grad) for p in self.parameters if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(shards)).double().square().sum()
        totals = torch.cat([sums, (squares / self.copies)[None]])
        if self.world.size > 1:
            dist.all_reduce(totals)  # in device order, nothing is read on the host
        loss_sum, correct, count, norm_square = totals.unbind()

        mean_factor = self.slots / count.clamp(min=1.0)
        grad_norm = norm_square.sqrt() * mean_factor
        clip = torch.ones_like(grad_norm)
        if self.clip_norm > 0:
            clip = (self.clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        skipped = ~(torch.isfinite(loss_sum) & torch.isfinite(grad_norm))
        scale = torch.where(skipped, 1.0, 1.0 / (mean_factor * clip))
        scaled_step(self.optimizer, scale.float(), skipped.float())
        self.optimizer.zero_grad()
        filled = count.clamp(min=1.0)
        return StepResult(loss_sum / filled, correct / filled, count, grad_norm, skipped.double())


IN_FLIGHT = 2
"""Steps that the host may be ahead of the device."""


class Window:
    """Sums of step results since the last log line, on the device, and the non-finite streak."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._streak = torch.zeros((), dtype=torch.float64, device=device)
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def add(self, result: StepResult) -> None:
        """Take one step in; a skipped one counts as such and leaves the means alone."""
        kept = 1.0 - result.skipped
        # A NaN times zero is a NaN, so a skipped step's numbers are replaced, not multiplied.
        values = torch.stack([result.loss, result.accuracy, result.grad_norm])
        values = torch.where(kept > 0, values, 0.0)
        self._sums += torch.cat([values, torch.stack([kept, result.skipped])])
        self._streak = (self._streak + 1.0) * result.skipped
        self._pending.append(self._copy_streak())

    def _copy_streak(self) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._streak.device.type != "cuda":
            return self._streak.clone(), None
        host = torch.empty((), dtype=torch.float64, pin_memory=True)
        host.copy_(self._streak, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def streak_if_ready(self) -> int:
        """Longest run of non-finite steps that the device has reported so far.

        Waits where the device is more than :data:`IN_FLIGHT` steps behind: replays of CUDA graphs
        hardly fill its queue, which holds the host back otherwise, and what a far advanced host
        says of its waiting for the loader means nothing.
        """
        if len(self._pending) > IN_FLIGHT:
            late = self._pending[-1 - IN_FLIGHT][1]
            if late is not None:
                late.synchronize()
        longest = 0
        while self._pending:
            host, event = self._pending[0]
            if event is not None and not event.query():
                break
            longest = max(longest, int(host))
            self._pending.popleft()
        return longest

    def read(self) -> dict[str, float | None]:
        """Means since the last call, and reset. Host sync: waits for the device.

        loss_nats, accuracy and grad_norm are None when every step was skipped.
        """
        loss, accuracy, norm, kept, skipped = self._sums.tolist()  # host sync
        self._sums.zero_()
        mean = {"loss_nats": loss, "accuracy": accuracy, "grad_norm": norm}
        return {
            **{key: value / kept if kept else None for key, value in mean.items()},
            "skipped_steps": skipped,
        }
