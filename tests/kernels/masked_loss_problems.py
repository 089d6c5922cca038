"""What the tests of the Triton masked loss share: problems, the definition, and the measure.

Plain PyTorch's own error against float64 at the same precision is the measure: the kernels' may be
at most twice as large, norm-wise, plus one rounding of the result (a short sum may be exact by
luck; results of a few numbers all the more, so that tiny random shapes are given eight roundings).
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import torch
import torch.nn.functional as F

from fastbeit_kernels import masked_linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("loss", "dhidden", "dweight", "dbias")


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def integers(low, high, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(DEVICE)


def problem(batch, tokens, slots, width, classes, *, bias=True, seed=0):
    """(hidden, weight, bias), positions, targets; some slots empty, slots None: rows selected."""
    tensors = [
        draw(batch, tokens, width, seed=seed),
        draw(classes, width, seed=seed + 1) * width**-0.5,
        draw(classes, seed=seed + 2) if bias else None,
    ]
    positions = None
    if slots is not None:
        positions = integers(-1, tokens, (batch, slots), seed + 3).int()
    targets = integers(-1, classes, (batch, slots or tokens), seed + 4)
    return tensors, positions, targets


def plain(hidden, positions, weight, bias, targets, label_smoothing):
    """The definition, in the inputs' precision from end to end."""
    filled = targets >= 0
    if positions is not None:
        filled = filled & (positions >= 0)
        hidden = torch.stack(
            [x[at.clamp(min=0).long()] for x, at in zip(hidden, positions, strict=True)]
        )
    logits = F.linear(hidden[filled], weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    found = F.cross_entropy(
        logits, targets[filled].long(), reduction="sum", label_smoothing=label_smoothing
    )
    correct = (logits.argmax(-1) == targets[filled]).sum()
    return found / max(1, int(filled.sum())), correct, filled.sum()


def triton(*arguments, label_smoothing=0.0):
    return masked_linear_cross_entropy(*arguments, label_smoothing=label_smoothing, impl="triton")


def results(call, tensors, positions, targets, smoothing=0.0, dloss=1.0):
    """[loss, gradients of hidden, weight and bias], (correct, count)."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    hidden, weight, bias = leaves
    loss, correct, count = call(hidden, positions, weight, bias, targets, label_smoothing=smoothing)
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(loss * dloss, wanted)
    return [loss.detach(), *gradients], (correct.item(), count.item())


def in_dtype(tensors, dtype):
    return [None if x is None else x.to(dtype) for x in tensors]


def distance(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def check(tensors, positions, targets, smoothing=0.0, dloss=1.0, roundings=1):
    """The kernels' results, having compared them."""
    dtype = tensors[0].dtype
    case = (positions, targets, smoothing, dloss)
    ours, our_counts = results(triton, tensors, *case)
    theirs, _ = results(plain, tensors, *case)
    truth, counts = results(plain, in_dtype(tensors, torch.float64), *case)
    if dtype == torch.float32:
        assert our_counts == counts
    assert ours[0].dtype == torch.float32
    for name, mine, other, exact in zip(NAMES, ours, theirs, truth, strict=False):
        assert mine.shape == exact.shape
        rounding = torch.finfo(mine.dtype).eps
        if name == "loss" and dtype != torch.float32:
            # One number, of logits that were rounded to half a unit, which may cancel by luck.
            rounding = torch.finfo(dtype).eps / 2
        allowed = 2 * distance(other, exact) + roundings * rounding
        assert distance(mine, exact) <= allowed, (name, distance(mine, exact), allowed)
    return ours, our_counts


def choices(**changes):
    """Every call takes a Hopper's launch choices but for these."""
    from fastbeit_kernels._cross_entropy import arguments, configs

    config = dataclasses.replace(configs.HOPPER, **changes)
    return mock.patch.object(arguments, "config_of", lambda *_: config)
