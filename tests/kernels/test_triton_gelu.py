"""Bias + GELU in Triton: values and gradients against float64, the normal distribution itself,
views, poison, repeatability, the operator under PyTorch's machinery."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastbeit_kernels import bias_gelu

pytest.importorskip("triton")
# Where nothing is loaded NumPy computes all the same, and warns of infinities that are not kept.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "dx", "dbias")


def draw(*shape, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator)).to(DEVICE)


def results(impl, x, bias, dout, dtype=None):
    """[out, dx, dbias], the last only where there is a bias."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, bias) if t is not None]
    out = bias_gelu(*leaves, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def distance(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def check(x, bias, dout) -> None:
    ours, plain = results("triton", x, bias, dout), results("reference", x, bias, dout)
    truth = results("reference", x, bias, dout, torch.float64)
    for name, mine, theirs, exact in zip(NAMES, ours, plain, truth, strict=False):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, name
        # From 16-bit x even an fp32 dbias has the polynomial's error.
        least = torch.finfo(theirs.dtype).eps if x.dtype == torch.float32 else 1e-5
        allowed = 2 * distance(theirs, exact) + max(least, torch.finfo(theirs.dtype).eps)
        assert distance(mine, exact) <= allowed, name


@pytest.mark.parametrize(
    ("shape", "biased"),
    [
        pytest.param((2, 2, 3072), True, id="BEiT-B's MLP, a few tokens"),
        pytest.param((3, 1, 1024), False, id="whole tiles, no bias"),
        pytest.param((19, 40), True, id="columns past the width"),
        pytest.param((1, 1), True, id="one element"),
        pytest.param((1300,), True, id="one row"),
    ],
)
def test_values_and_gradients(shape, biased) -> None:
    bias = draw(shape[-1], seed=1) if biased else None
    check(draw(*shape), bias, draw(*shape, seed=2))


@settings(max_examples=8)
@given(
    rows=st.integers(1, 12),
    width=st.integers(1, 600),
    spread=st.floats(0.1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_shape_spread_and_dtype(rows, width, spread, dtype) -> None:
    """The bias stays in fp32, as mixed precision leaves it."""
    x, dout = (draw(rows, width, seed=seed, spread=spread).to(dtype) for seed in (0, 1))
    check(x, draw(width, seed=2), dout)


@pytest.mark.parametrize("rows", [1, 2])
def test_dbias_over_stretches_of_many_rows(rows, monkeypatch) -> None:
    """Five stretches, the last one shorter, of two blocks of columns; shares in several turns."""
    from fastbeit_kernels._gelu import arguments, configs

    config = dataclasses.replace(configs.GELU["sm_90"], warps=1, backward_rows=rows, programs=10)
    monkeypatch.setattr(arguments, "config_of", lambda _: config)
    monkeypatch.setattr(arguments, "SUM_SHARES", 2)
    x = draw(61, 130)
    assert arguments.stretches(x, config) == 5
    check(x, draw(130, seed=1), draw(61, 130, seed=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype) -> None:
    """All of them, elementwise: rounded once, and 1e-5 of the value off before that, but for what
    no fp32 or no number of the dtype resolves. PyTorch's 1 + erf loses all digits towards -5.5."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = numbers[numbers.isfinite()].to(DEVICE)
    exact_x = x.double()
    # x Φ(x) by erfc, without cancellation.
    exact = exact_x * 0.5 * torch.special.erfc(-exact_x * 0.5**0.5)
    found = bias_gelu(x, impl="triton")
    info = torch.finfo(dtype)
    # The interpreter cuts bf16 off where a GPU rounds it.
    rounded = DEVICE == "cuda" or dtype == torch.float16
    unit = info.eps / (2 if rounded else 1) + 1e-5
    # Past 6 standard deviations at most 6e-14 is left.
    floor = max(6e-14, info.tiny * info.eps if dtype == torch.float16 else 0.0)
    error = (found.double() - exact).abs()
    assert bool((error <= unit * exact.abs() + floor).all())


def test_infinities_and_nan_are_pytorchs() -> None:
    x = torch.tensor([float("inf"), float("nan"), -1e30, 1e30], device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        ours, plain = (bias_gelu(x.to(dtype), impl=impl) for impl in ("triton", "reference"))
        torch.testing.assert_close(ours, plain, equal_nan=True)


def as_view(tensor, kind):
    """The same values in other memory; around them NaN, so that an over-read shows."""
    rows, width = tensor.shape
    nan = float("nan")
    if kind == "sliced":
        view = tensor.new_full((rows + 3, width + 9), nan)[2:-1, 5:-4]
    elif kind == "odd offset":
        view = tensor.new_full((tensor.numel() + 3,), nan)[3:].view(rows, width)
    elif kind == "every second column":
        view = tensor.new_full((rows, 2 * width), nan)[:, ::2]
    else:
        view = tensor.new_full((width, rows), nan).t()
    return view.copy_(tensor)


@pytest.mark.parametrize("kind", ["sliced", "odd offset", "every second column", "transposed"])
def test_views(kind) -> None:
    x, bias, dout = draw(21, 40), draw(40, seed=1), draw(21, 40, seed=2)
    expected = results("triton", x, bias, dout)
    strided = torch.full((80,), float("nan"), device=DEVICE)[::2].copy_(bias)
    found = results("triton", as_view(x, kind), strided, as_view(dout, kind))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_everything_is_written_and_repeats(monkeypatch) -> None:
    """Fresh memory full of NaN gives the same bits, as does a second run."""
    case = draw(60, 70), draw(70, seed=1), draw(60, 70, seed=2)
    expected, empty = results("triton", *case), torch.empty

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    for mine, theirs in zip(results("triton", *case), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", ["sm_80", "sm_86", "sm_90", "sm_100"])
def test_every_launch_choice_computes_the_same(family, monkeypatch) -> None:
    from fastbeit_kernels._gelu import arguments, configs

    monkeypatch.setattr(arguments, "config_of", lambda _: configs.GELU[family])
    check(draw(9, 50), draw(50, seed=1), draw(9, 50, seed=2))


def test_the_operator_under_pytorchs_machinery() -> None:
    from fastbeit_kernels._gelu import ops

    x, bias = draw(6, 20).requires_grad_(), draw(20, seed=1).requires_grad_()
    opcheck(ops.bias_gelu_forward, (x, bias))
    opcheck(ops.bias_gelu_forward, (x, None))

    def model(x, bias):
        return bias_gelu(x * 2, bias, impl="triton").square().sum()

    plain = torch.autograd.grad(model(x, bias), (x, bias))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(compiled(x, bias), (x, bias))
    kept = checkpoint(model, x, bias, use_reentrant=False)
    assert isinstance(kept, torch.Tensor)
    recomputed = torch.autograd.grad(kept, (x, bias))
    for one, two, three in zip(plain, again, recomputed, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    (alone,) = torch.autograd.grad(model(x.detach(), bias), bias)
    assert torch.equal(alone, plain[1])
    (alone,) = torch.autograd.grad(model(x, bias.detach()), x)
    assert torch.equal(alone, plain[0])
    (gradient,) = torch.autograd.grad(model(x, bias), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bias_gelu has no second derivative on Triton"):
        gradient.sum().backward()


def test_what_is_refused() -> None:
    x = draw(2, 6)
    for call, message in (
        (lambda: bias_gelu([1.0]), r"x must be a tensor \[N\], got list"),
        (lambda: bias_gelu(x, draw(5)), r"bias must be \[6\], got \[5\]"),
        (lambda: bias_gelu(x.int()), "x must have one of the dtypes float32"),
        (lambda: bias_gelu(x.double(), impl="triton"), "and x is torch.float64"),
        (lambda: bias_gelu(x[:0], impl="triton"), "there is nothing to compute: x is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert bias_gelu(x[:0]).shape == (0, 6)
