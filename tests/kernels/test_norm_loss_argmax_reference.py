"""Residual + LayerNorm, masked loss, argmax head: against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from fastbeit_kernels import (
    linear_argmax,
    masked_linear_cross_entropy,
    scale_residual,
    scale_residual_layer_norm,
)


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return drawn.requires_grad_()


@pytest.mark.parametrize("with_gamma", [True, False])
@pytest.mark.parametrize("with_drop", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_residual_norm_values_and_gradients(with_gamma, with_drop, with_bias) -> None:
    x, branch, weight = draw(2, 3, 8), draw(2, 3, 8, seed=1), draw(8)
    bias = draw(8, seed=2) if with_bias else None
    gamma = draw(8, seed=3) if with_gamma else None
    drop = torch.tensor([0.0, 1.25], dtype=torch.float64) if with_drop else None
    y, normed = scale_residual_layer_norm(
        x, branch, weight=weight, bias=bias, eps=0.01, gamma=gamma, drop_scale=drop
    )
    factor = (1 if gamma is None else gamma) * (1 if drop is None else drop[:, None, None])
    expected_y = x + factor * branch
    centred = expected_y - expected_y.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.01).sqrt() * weight
    expected = expected if bias is None else expected + bias
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(scale_residual(x, branch, gamma=gamma, drop_scale=drop), expected_y)
    inputs = [t for t in (x, branch, weight, bias, gamma) if t is not None]
    mix = draw(2, 3, 8, seed=9).detach()
    ours = torch.autograd.grad((y * mix).sum() + (normed * mix.roll(1)).sum(), inputs)
    theirs = torch.autograd.grad((expected_y * mix).sum() + (expected * mix.roll(1)).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_branch_y_is_x() -> None:
    x = draw(2, 3, 8)
    y, normed = scale_residual_layer_norm(x, weight=torch.ones(8).double(), bias=None)
    assert y is x
    expected = torch.nn.functional.layer_norm(x, (8,), eps=1e-6)
    torch.testing.assert_close(normed, expected)


def test_bf16_stream_takes_fp32_factors_and_stays_bf16() -> None:
    x, branch = draw(2, 3, 8, dtype=torch.bfloat16), draw(2, 3, 8, seed=1, dtype=torch.bfloat16)
    gamma, drop = torch.full((8,), 0.1), torch.tensor([0.0, 1 / 0.9])
    y, normed = scale_residual_layer_norm(
        x, branch, weight=torch.ones(8), bias=torch.zeros(8), gamma=gamma, drop_scale=drop
    )
    assert y.dtype == normed.dtype == torch.bfloat16
    exact = x.double() + gamma.double() * drop.double()[:, None, None] * branch.double()
    assert torch.equal(y, exact.to(torch.bfloat16))  # rounded once
    y.float().sum().backward()
    assert branch.grad.dtype == torch.bfloat16


def test_an_fp32_stream_keeps_its_precision_with_bf16_branches() -> None:
    x, branch = draw(1, 2, 8, dtype=torch.float32), draw(1, 2, 8, dtype=torch.bfloat16)
    y, _ = scale_residual_layer_norm(x, branch, weight=torch.ones(8), bias=None)
    assert y.dtype == torch.float32
    assert torch.equal(y, x + branch.float())


def written_out_loss(hidden, rows, weight, bias, targets):
    terms, correct = [], 0
    for b, row in enumerate(rows):
        for slot, position in enumerate(row):
            if position is None:
                continue
            logits = weight @ hidden[b, position] + bias
            target = targets[b][slot]
            terms.append(logits.logsumexp(0) - logits[target])
            correct += int(logits.argmax() == target)
    return sum(terms) / len(terms), correct, len(terms)


def test_loss_counts_filled_slots_alone_with_every_gradient() -> None:
    hidden, weight, bias = draw(3, 6, 4), draw(7, 4), draw(7, seed=5)
    positions = torch.tensor([[0, 5, 2], [4, -1, 4], [-1, -1, -1]], dtype=torch.int32)
    # Behind empty slots: out of range either way. A negative target empties its slot.
    targets = torch.tensor([[6, 0, 3], [-1, 10**12, 2], [-(10**12), 7, 99]])
    rows = [[0, 5, 2], [None, None, 4], [None] * 3]
    ours = masked_linear_cross_entropy(hidden, positions, weight, bias, targets)
    loss, correct, count = written_out_loss(hidden, rows, weight, bias, targets.tolist())
    assert (ours.correct.item(), ours.count.item()) == (correct, count) == (correct, 4)
    assert ours.loss.dtype == torch.float32 and ours.count.dtype == torch.int64
    torch.testing.assert_close(ours.loss.double(), loss, rtol=1e-6, atol=0)
    inputs = [hidden, weight, bias]
    for a, b in zip(
        torch.autograd.grad(ours.loss, inputs), torch.autograd.grad(loss, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    index = positions.clamp(min=0).long()[..., None].expand(-1, -1, 4)
    selected = torch.where(positions >= 0, targets, -1)
    again = masked_linear_cross_entropy(hidden.gather(1, index), None, weight, bias, selected)
    assert torch.equal(torch.stack(again), torch.stack(ours))


def test_correct_counts_the_argmax() -> None:
    hidden, weight = torch.eye(4)[None], torch.eye(4)
    out = masked_linear_cross_entropy(hidden, None, weight, None, torch.tensor([[0, 1, 3, -1]]))
    assert (out.correct.item(), out.count.item()) == (2, 3)


def test_no_filled_slot_is_zero_and_not_nan() -> None:
    hidden, weight, bias = draw(2, 3, 4), draw(5, 4), draw(5)
    empty = torch.full((2, 3), -1)
    out = masked_linear_cross_entropy(hidden, empty, weight, bias, torch.full((2, 3), 10**9))
    assert out.loss.item() == out.correct.item() == out.count.item() == 0
    for gradient in torch.autograd.grad(out.loss, [hidden, weight, bias]):
        assert gradient.eq(0).all()


def test_nan_behind_an_empty_slot_stays_there() -> None:
    hidden, weight = draw(1, 2, 4), draw(5, 4)
    poisoned = hidden.detach().clone()
    poisoned[:, 1] = math.nan
    out = masked_linear_cross_entropy(poisoned, None, weight, None, torch.tensor([[2, -1]]))
    (gradient,) = torch.autograd.grad(out.loss, [weight])
    assert out.loss.isfinite() and gradient.isfinite().all()


def test_argmax_head_takes_the_best_and_the_lowest_of_equals() -> None:
    x, weight, bias = draw(50, 16, dtype=torch.float32), draw(64, 16, dtype=torch.float32), draw(64)
    scores = x.double() @ weight.double().T + bias
    ours = linear_argmax(x, weight, bias.float())
    assert ours.dtype == torch.int64 and not ours.requires_grad
    assert torch.equal(ours, scores.argmax(-1))
    assert torch.equal(linear_argmax(x, weight), (x.double() @ weight.double().T).argmax(-1))
    twice = torch.cat((weight, weight))
    assert torch.equal(linear_argmax(x, twice, torch.cat((bias, bias)).float()), ours)
    assert torch.equal(linear_argmax(x, torch.zeros(9, 16)), torch.zeros(50, dtype=torch.int64))


def test_argmax_of_bf16_inputs_is_compared_in_fp32() -> None:
    """bf16 scores near 100 are 0.5 apart; the inputs tell them apart all the same."""
    x = torch.ones(1, 100, dtype=torch.bfloat16)
    weight = torch.ones(3, 100, dtype=torch.bfloat16)
    weight[1, 0], weight[2, 0] = 1.0625, 1.125
    assert linear_argmax(x, weight).tolist() == [2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_argmax(x.float(), weight.float()).tolist() == [2]
