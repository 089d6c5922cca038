"""Forward and backward of the masked loss, from tensors to products and launches, in their order.

Shapes: B images, T rows of hidden, M slots, R = B M, D width, V classes, V8 is V rounded up to 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import on_device
from . import arguments


class Forward(NamedTuple):
    """Scalars, and what the backward needs: empty tensors where it doesn't.

    ``gradient [R, V8]`` and ``dbias [V8]`` (fp32) are those of the sum of the rows' losses, not of
    their mean; what stands behind V means nothing.
    """

    loss: Tensor
    correct: Tensor
    count: Tensor
    gradient: Tensor
    rows: Tensor
    sources: Tensor
    dbias: Tensor


def empty_forward(
    hidden: Tensor,
    targets: Tensor,
    classes: int,
    wants: tuple[bool, bool, bool],
) -> Forward:
    """All results, allocated. ``wants``: gradients of hidden, weight, bias."""
    total, length = targets.numel(), arguments.row_length(classes)

    def empty(wanted: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=hidden.device)

    return Forward(
        empty(True, torch.float32),
        empty(True, torch.int64),
        empty(True, torch.int64),
        empty(wants[0] or wants[1], hidden.dtype, total, length),
        empty(wants[1], hidden.dtype, total, hidden.shape[2]),
        empty(wants[0], torch.int32, total),
        empty(wants[2], torch.float32, length),
    )


def run_forward(
    hidden: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    smoothing: float,
    wants: tuple[bool, bool, bool],
) -> Forward:
    classes, total = weight.shape[0], targets.numel()
    out = empty_forward(hidden, targets, classes, wants)
    made = empty_forward(hidden, targets, classes, (not wants[0], not wants[1], False))
    needs_gradient = wants[0] or wants[1]
    rows = out.rows if wants[1] else made.rows
    sources = out.sources if wants[0] else made.sources
    logits = out.gradient if needs_gradient else made.gradient
    labels = torch.empty(total, dtype=torch.int32, device=hidden.device)
    config = arguments.config_of(hidden)
    programs = arguments.loss_programs(config, total, classes)
    losses = torch.empty(programs, dtype=torch.float32, device=hidden.device)
    counts = torch.empty(2, programs, dtype=torch.int32, device=hidden.device)
    partials = dbias = scales = None
    if wants[2]:
        dbias = out.dbias
        shape = (arguments.dbias_partials(config, total, classes), dbias.numel())
        partials = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    bias = _readable(bias)
    with on_device(hidden), torch.autocast(hidden.device.type, enabled=False):
        arguments.gather_launch(hidden, positions, targets, rows, labels, sources, classes).run()
        torch.mm(rows, _plain(weight).t(), out=logits[:, :classes])
        if arguments.is_whole(config, classes):
            arguments.whole_launch(
                logits, bias, labels, losses, counts, partials, classes, smoothing,
                needs_gradient, config,
            ).run()  # fmt: skip
        else:
            if any(wants):
                scales = torch.empty(total, 2, dtype=torch.float32, device=hidden.device)
            arguments.first_launch(
                logits, bias, labels, losses, counts, scales, classes, smoothing, config
            ).run()
            if scales is not None:
                arguments.second_launch(
                    logits, bias, labels, scales, partials, classes, smoothing, needs_gradient,
                    config,
                ).run()  # fmt: skip
        arguments.sum_launch(
            losses, counts, partials, out.loss, out.correct, out.count, dbias
        ).run()
    return out


def _readable(bias: Tensor | None) -> Tensor | None:
    """In one piece and, as rows of logits, whole groups of 8 long; a copy only where it must be."""
    if bias is None or (bias.is_contiguous() and bias.numel() % 8 == 0):
        return bias
    memory = torch.empty(arguments.row_length(bias.numel()), dtype=bias.dtype, device=bias.device)
    memory[: bias.numel()] = bias
    return memory


def _plain(weight: Tensor) -> Tensor:
    """The weight itself wherever rows or columns lie in one piece, as a product reads them; the
    library would copy another, and might then take another product, with other bits."""
    return weight if 1 in weight.stride() else weight.contiguous()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b into fp32: in fp16 a sum over rows, which is not scaled yet, could overflow."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def run_backward(
    dloss: Tensor,
    count: Tensor,
    gradient: Tensor,
    rows: Tensor,
    sources: Tensor,
    dbias: Tensor,
    weight: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias_scaled: Tensor,
) -> None:
    """Fill the last three, of which empty ones are not wanted."""
    logit_gradient = gradient[:, : weight.shape[0]] if gradient.numel() else gradient
    with on_device(dloss), torch.autocast(dloss.device.type, enabled=False):
        if dhidden.numel():
            product = _product(logit_gradient, _plain(weight))
            arguments.scatter_launch(product, sources, dloss, count, dhidden).run()
        if dweight.numel():
            product = _product(logit_gradient.t(), rows)
            arguments.scale_launch(product, dloss, count, dweight).run()
        if dbias_scaled.numel():
            arguments.scale_launch(dbias, dloss, count, dbias_scaled).run()
