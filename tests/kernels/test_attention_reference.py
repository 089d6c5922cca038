"""Attention: against sums written out in float64, with every gradient."""

from __future__ import annotations

import math

import pytest
import torch

from fastbeit_kernels import (
    attention,
    attention_packed,
    expand_rel_pos_bias,
    rel_pos_attention,
    rel_pos_attention_packed,
)


def draw(*shape, dtype=torch.float64, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return drawn.requires_grad_(grad)


def written_out(q, k, v, bias_of, scale):
    """One query at a time; ``bias_of(b, h, i)`` is its row of the bias."""
    batch, queries, heads, _ = q.shape
    rows = []
    for b in range(batch):
        for i in range(queries):
            for h in range(heads):
                scores = (k[b, :, h] * q[b, i, h]).sum(-1) * scale + bias_of(b, h, i)
                weights = scores.exp() / scores.exp().sum()
                rows.append((weights[:, None] * v[b, :, h]).sum(0))
    return torch.stack(rows).unflatten(0, (batch, queries, heads))


def gradients(output, inputs):
    generator = torch.Generator().manual_seed(77)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    "bias_shape", [None, (5,), (4, 5), (3, 4, 5), (3, 1, 5), (1, 1, 1, 5), (2, 3, 4, 5)]
)
def test_values_and_gradients_for_any_broadcastable_bias(bias_shape, scale) -> None:
    q, k, v = draw(2, 4, 3, 6), draw(2, 5, 3, 6, seed=1), draw(2, 5, 3, 6, seed=2)
    bias = None if bias_shape is None else draw(*bias_shape, seed=3)
    inputs = [q, k, v] + ([] if bias is None else [bias])
    full = torch.zeros(2, 3, 4, 5) if bias is None else bias.expand(2, 3, 4, 5)
    expected = written_out(q, k, v, lambda b, h, i: full[b, h, i], scale or 1 / math.sqrt(6))
    ours = attention(q, k, v, bias, scale=scale)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(gradients(ours, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():  # another way through PyTorch
        torch.testing.assert_close(attention(q, k, v, bias, scale=scale), expected)


def test_query_positions_choose_rows_and_empty_slots_are_zero_without_gradient() -> None:
    positions = torch.tensor([[0, 4, 2], [3, -1, 3], [-1, -1, -1]], dtype=torch.int32)
    q, k, v = draw(3, 3, 2, 4), draw(3, 5, 2, 4, seed=1), draw(3, 5, 2, 4, seed=2)
    bias = draw(2, 5, 5, seed=3)
    rows = positions.tolist()
    expected = written_out(q, k, v, lambda b, h, i: bias[h, rows[b][i]], 0.5)
    expected = torch.where((positions >= 0)[..., None, None], expected, 0.0)
    ours = attention(q, k, v, bias, query_positions=positions)
    torch.testing.assert_close(ours, expected)
    inputs = [q, k, v, bias]
    mine, theirs = gradients(ours, inputs), gradients(expected, inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert mine[0][positions < 0].eq(0).all() and mine[1][2].eq(0).all()
    assert mine[3][:, 1].eq(0).all()  # a row nobody asked for


def test_garbage_in_empty_slots_reaches_nothing() -> None:
    positions = torch.tensor([[2, -1]])
    q, k, v, bias = draw(1, 2, 2, 4), draw(1, 3, 2, 4), draw(1, 3, 2, 4, seed=1), draw(2, 3, 3)
    poisoned = q.detach().clone()
    poisoned[:, 1] = math.nan
    poisoned.requires_grad_()
    clean = attention(q, k, v, bias, query_positions=positions)
    dirty = attention(poisoned, k, v, bias, query_positions=positions)
    assert torch.equal(clean, dirty)
    for a, b in zip(gradients(clean, [k, v, bias]), gradients(dirty, [k, v, bias]), strict=True):
        assert torch.equal(a, b)
    assert attention(q, k, v, query_positions=positions)[:, 1].eq(0).all()


def test_packed_is_the_same_and_its_gradient_comes_back_packed() -> None:
    qkv, bias = draw(2, 5, 3, 2, 4), draw(2, 5, 5)
    q, k, v = (part.detach().clone().requires_grad_() for part in qkv.unbind(2))
    packed, apart = attention_packed(qkv, bias), attention(q, k, v, bias)
    torch.testing.assert_close(packed, apart)
    packed_gradient, packed_bias = gradients(packed, [qkv, bias])
    *apart_gradients, apart_bias = gradients(apart, [q, k, v, bias])
    assert packed_gradient.is_contiguous()
    torch.testing.assert_close(packed_gradient, torch.stack(apart_gradients, 2))
    torch.testing.assert_close(packed_bias, apart_bias)


def test_strided_views_are_read_as_they_are() -> None:
    whole = draw(2, 5, 3, 2, 4)
    views = [whole[:, :, i] for i in range(3)]
    copies = [view.detach().clone().requires_grad_() for view in views]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(attention(*views), attention(*copies))


@pytest.mark.parametrize("learning", [True, False])
def test_bf16_error_is_that_of_bf16_products(learning) -> None:
    """At most twice the error of the plainest bf16 way; and the bias keeps its fp32 gradient."""
    exact = [draw(2, 50, 2, 32, seed=seed) for seed in range(3)]
    bias = draw(2, 50, 50, seed=4)
    expected = attention(*exact, bias)
    wanted = gradients(expected, [bias])[0]
    q, k, v = (x.detach().bfloat16().requires_grad_(learning) for x in exact)
    half_bias = bias.detach().float().requires_grad_(learning)
    ours = attention(q, k, v, half_bias)
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * 32**-0.5 + half_bias.bfloat16()
    plain = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)

    def error(x, reference):
        return (x.double() - reference).norm() / reference.norm()

    assert ours.dtype == torch.bfloat16
    assert error(ours, expected) <= 2 * error(plain, expected)
    if learning:
        gradient = gradients(ours, [half_bias])[0]
        assert gradient.dtype == torch.float32
        plain_error = error(gradients(plain, [half_bias])[0], wanted)
        assert error(gradient, wanted) <= 2 * plain_error


def test_large_scores_do_not_overflow() -> None:
    q = torch.full((1, 2, 1, 4), 300.0)
    out = attention(q, q, torch.ones(1, 2, 1, 4), torch.tensor([[0.0, 500.0]]))
    torch.testing.assert_close(out, torch.ones(1, 2, 1, 4))


def test_expanded_bias_is_fp32_with_rows_a_multiple_of_8_apart() -> None:
    table = draw(7, 3, dtype=torch.bfloat16)
    index = torch.randint(0, 7, (5, 5), generator=torch.Generator().manual_seed(0))
    bias = expand_rel_pos_bias(table, index)
    assert bias.dtype == torch.float32 and bias.shape == (3, 5, 5)
    assert bias.stride() == (40, 8, 1)
    for h, i, j in ((0, 0, 0), (2, 4, 1), (1, 3, 4)):
        assert bias[h, i, j] == table[index[i, j], h].float()


def test_expansion_sums_its_gradient_into_the_table() -> None:
    table = draw(6, 2, dtype=torch.float32)
    index = torch.tensor([[0, 1, 1], [5, 0, 1], [5, 5, 5]])
    weights = draw(2, 3, 3, dtype=torch.float32, grad=False)
    (gradient,) = torch.autograd.grad((expand_rel_pos_bias(table, index) * weights).sum(), table)
    expected = torch.zeros(6, 2)
    for i in range(3):
        for j in range(3):
            expected[index[i, j]] += weights[:, i, j]
    torch.testing.assert_close(gradient, expected)
    assert gradient[2:5].eq(0).all()


def test_table_forms_are_expansion_then_attention() -> None:
    table = draw(9, 2, dtype=torch.float32)
    index = torch.randint(0, 9, (5, 5), generator=torch.Generator().manual_seed(3))
    qkv = draw(2, 5, 3, 2, 4, dtype=torch.float32)
    expected = attention_packed(qkv, expand_rel_pos_bias(table, index), scale=0.4)
    wanted = gradients(expected, [qkv, table])
    packed = rel_pos_attention_packed(qkv, table, index, grid=(2, 2), scale=0.4)
    apart = rel_pos_attention(*qkv.unbind(2), table, index, grid=(2, 2), scale=0.4)
    for ours in (packed, apart):
        assert torch.equal(ours, expected)
        for a, b in zip(gradients(ours, [qkv, table]), wanted, strict=True):
            torch.testing.assert_close(a, b)
    rows = torch.tensor([[4, -1], [0, 2]])
    some = rel_pos_attention(
        qkv[:, :2, 0], qkv[:, :, 1], qkv[:, :, 2], table, index, query_positions=rows
    )
    full = attention(
        qkv[:, :2, 0], qkv[:, :, 1], qkv[:, :, 2], expand_rel_pos_bias(table, index),
        query_positions=rows,
    )  # fmt: skip
    assert torch.equal(some, full)
