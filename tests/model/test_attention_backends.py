"""Every attention backend against the definition in float64: values, gradients, empty slots."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch

from fastbeit.model import Backends, BeitConfig, BeitForMim
from fastbeit.model.attention_backends import attend, attend_packed
from fastbeit_kernels import reference

BATCH, TOKENS, HEADS, WIDTH = 2, 17, 2, 16
POSITIONS = torch.tensor([[1, 6, 6, 16, -1], [0, 4, -1, -1, 2]], dtype=torch.int32)
TRAINS_HERE = ["reference", "sdpa", "triton", "xformers"]


def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
    """xformers', as far as its documentation and error messages say what it takes."""
    batch, queries, heads, _ = q.shape
    if attn_bias is not None:
        assert attn_bias.shape == (batch, heads, queries, k.shape[1])
        assert attn_bias.dtype == q.dtype
        assert attn_bias.stride(-2) % 8 == 0 and attn_bias.stride(-1) == 1
    out = reference.softmax_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_bias, scale or q.shape[-1] ** -0.5
    )
    return out.transpose(1, 2)


@pytest.fixture(autouse=True)
def stand_in_for_xformers(monkeypatch) -> None:
    """It has no CPU kernels; its conventions are checked, its arithmetic is the definition's."""
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    package = types.ModuleType("xformers")
    package.ops = ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def inputs(queries: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, rows, HEADS, WIDTH) for rows in (queries, TOKENS, TOKENS)]
    shapes.append((HEADS, TOKENS, TOKENS))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def attended(name: str, tensors: list[torch.Tensor], positions: torch.Tensor | None):
    """Output and gradients of all tensors, for a fixed gradient of the output."""
    q, k, v, bias = tensors
    out = attend(name, q, k, v, bias, query_positions=positions)  # type: ignore[arg-type]
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, tensors, gradient.to(out.dtype))]


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["all queries", "a subset"])
@pytest.mark.parametrize("name", TRAINS_HERE)
def test_values_and_gradients_are_those_of_the_definition(name, positions) -> None:
    queries = TOKENS if positions is None else POSITIONS.shape[1]
    expected = attended("reference", inputs(queries, torch.float64), positions)
    found = attended(name, inputs(queries), positions)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    if positions is not None:
        for tensor in found[:2]:  # rows of empty slots, and their gradient
            assert tensor[positions < 0].eq(0).all()
            assert tensor[positions >= 0].ne(0).all()


@pytest.mark.parametrize("name", TRAINS_HERE)
def test_a_packed_call_without_bias_is_the_same_function(name) -> None:
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, WIDTH, generator=torch.Generator().manual_seed(2))
    expected = reference.attention_packed(qkv.double())
    torch.testing.assert_close(attend_packed(name, qkv).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["all queries", "a subset"])
def test_flex_agrees_forward_which_is_all_that_a_cpu_has(positions) -> None:
    learning = inputs(TOKENS if positions is None else POSITIONS.shape[1])
    q, k, v, bias = (tensor.detach() for tensor in learning)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        found = attend("flex", q, k, v, bias, query_positions=positions)
        expected = reference.attention(q, k, v, bias, query_positions=positions)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        attend("flex", *learning, query_positions=positions)


@pytest.mark.parametrize("position", ["relative", "relative_per_block", "none"])
@pytest.mark.parametrize("name", TRAINS_HERE)
def test_the_model_trains_alike_on_each(name, position) -> None:
    config = BeitConfig(
        image_size=16, patch_size=4, width=32, depth=2, heads=2, vocab_size=24, position=position
    )
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[0, 5, 9, 15], [2, 3, -1, -1]], dtype=torch.int32)
    expected, model = (
        BeitForMim(config, seed=0, backends=Backends("reference", attention))
        for attention in ("auto", name)
    )
    for each in (expected, model):
        each.loss(images, positions, positions.long()).loss.backward()
    for (key, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm()
        assert error <= 1e-4 * theirs.grad.norm() + 1e-9, key


def test_an_unknown_name_is_refused() -> None:
    q, k, v, _ = inputs(TOKENS)
    with pytest.raises(ValueError, match=r"attention must be auto, triton, .* got 'cudnn'"):
        attend("cudnn", q, k, v)  # type: ignore[arg-type]
