"""Linear heads over many classes: the loss at masked rows, and the argmax alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._checks import INTEGERS, check_same_dtype, check_tensor, classes_unfit, rows_unfit
from .._dispatch import Impl, choose
from ..reference import MimLoss


def masked_linear_cross_entropy(
    hidden: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> MimLoss:
    """Cross-entropy of a linear head at chosen rows, without a logits row for any other.

    Args:
        hidden: ``[B, T, D]``; or, with positions None, ``[B, M, D]``: rows already selected.
        positions: ``[B, M]`` integers, rows of hidden, -1 for an empty slot; or None. They may
            repeat.
        weight, bias: ``[V, D]`` and ``[V]`` or None, of hidden's dtype. Under autocast all three
            are cast as ``torch.nn.functional.linear``'s arguments are.
        targets: ``[B, M]`` integers, class numbers. Not read where positions is -1; a negative
            target empties its slot.
        label_smoothing: the share, 0 to 1, of a target's weight that all V classes get in equal
            parts (as ``torch.nn.functional.cross_entropy`` has it).
        impl: see the package.

    A target of V or more, and a position of T or more, are errors of the caller: the reference ends
    in PyTorch's own (on a GPU an assertion of the device); Triton reads nothing out of bounds and
    makes loss and gradients NaN, because it can raise nothing without waiting for the device.

    Memory on Triton, besides arguments and results: the logits ``[B * M, V]`` once, in hidden's
    dtype (157 MB for 128 images, 75 slots, 8,192 classes in bf16), freed with the forward where no
    gradient is wanted; else the gradient takes their place and is kept until the backward, with the
    rows ``[B * M, D]``. Partial sums of the bias's gradient take at most 300 V fp32 numbers during
    the forward, and the two products of the backward are held in fp32, one at a time.

    Returns:
        MimLoss(loss, correct, count): the mean in nats over filled slots (0 if none), how many of
        them the argmax gets right, how many there are. Device scalars; nothing waits.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    check_tensor("hidden", hidden, ("B", "T" if positions is not None else "M", "D"))
    batch, rows, width = hidden.shape
    slots: int | str = rows
    if positions is not None:
        check_tensor("positions", positions, (batch, "M"), dtypes=INTEGERS, like=hidden)
        slots = positions.shape[1]
    check_tensor("targets", targets, (batch, slots), dtypes=INTEGERS, like=hidden)
    check_tensor("weight", weight, ("V", width), like=hidden)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), like=hidden)
    if not torch.is_autocast_enabled(hidden.device.type):
        if bias is None:
            check_same_dtype(hidden=hidden, weight=weight)
        else:
            check_same_dtype(hidden=hidden, weight=weight, bias=bias)
    unfit = rows_unfit(hidden=hidden, weight=weight, bias=bias) or classes_unfit(weight)
    if targets.numel() == 0:
        unfit = unfit or "there is nothing to compute: targets is empty"
    match choose("masked_linear_cross_entropy", impl, hidden, unfit):
        case "triton":
            from .._cross_entropy import ops

            return ops.masked_linear_cross_entropy(
                hidden, positions, weight, bias, targets, label_smoothing
            )
        case "reference":
            return reference.masked_linear_cross_entropy(
                hidden, positions, weight, bias, targets, label_smoothing=label_smoothing
            )


def linear_argmax(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """argmax over V of ``x [R, D] @ weight [V, D].T + bias [V]`` → int64 ``[R]``; no gradient.

    Scores are compared in fp32, whatever the inputs' dtype and under autocast too; ties go to the
    lowest index, and NaN is larger than everything. A weight of another dtype is taken in x's (by
    the reference on a CPU, both in fp32).
    """
    check_tensor("x", x, ("R", "D"))
    check_tensor("weight", weight, ("V", x.shape[1]), like=x)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), like=x)
    unfit = rows_unfit(x=x, weight=weight, bias=bias) or classes_unfit(weight)
    match choose("linear_argmax", impl, x, unfit):
        case "triton":
            from .._linear_argmax import ops

            return ops.linear_argmax(x, weight, bias)
        case "reference":
            return reference.linear_argmax(x, weight, bias)
