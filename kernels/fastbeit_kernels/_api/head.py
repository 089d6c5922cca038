"""Linear heads over many classes: the loss at masked rows, and the argmax alone."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .._checks import INTEGERS, check_tensor, classes_unfit, rows_unfit
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
        positions: ``[B, M]`` integers, rows of hidden, -1 for an empty slot; or None.
        weight, bias: ``[V, D]`` and ``[V]`` or None.
        targets: ``[B, M]`` int64 class numbers. Not read where positions is -1; a negative target
            empties its slot.
        label_smoothing: the share, 0 to 1, of a target's weight that all V classes get in equal
            parts (as ``torch.nn.functional.cross_entropy`` has it).

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
    unfit = rows_unfit(hidden=hidden, weight=weight, bias=bias) or classes_unfit(weight)
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

    Scores are compared in fp32, whatever the inputs' dtype; ties go to the lowest index.
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
