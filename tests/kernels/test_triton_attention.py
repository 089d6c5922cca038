"""The Triton attention kernels against float64: values and every gradient, of every kind of call.

Without a GPU they are interpreted; with one they run on it. The measure is plain PyTorch's own
error at the same precision: the kernels' may be at most twice as large, norm-wise, plus one
rounding of the result (a short sum may be exact by luck).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbeit_kernels import _configs, attention, attention_packed, reference

pytest.importorskip("triton")

# Padding holds whatever was in memory, and NumPy warns of its infinities; nothing of it is kept.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "dq", "dk", "dv", "dbias")


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def results(call, tensors, dout):
    """[out, dq, dk, dv, dbias or None] of ``call(q, k, v, bias)``."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    out = call(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = list(torch.autograd.grad(out, wanted, dout.to(out.dtype)))
    return [out.detach(), *gradients]


def in_dtype(tensors, dtype):
    return [None if x is None else x.to(dtype) for x in tensors]


def distance(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def check(tensors, dout, *, positions=None, scale=None):
    """The kernels' fp32 results, having compared them."""

    def run(impl):
        return lambda q, k, v, bias: attention(
            q, k, v, bias, query_positions=positions, scale=scale, impl=impl
        )

    ours = results(run("triton"), tensors, dout)
    plain = results(run("reference"), tensors, dout)
    truth = results(run("reference"), in_dtype(tensors, torch.float64), dout)
    for name, mine, theirs, exact in zip(NAMES, ours, plain, truth, strict=False):
        assert mine.shape == exact.shape and mine.dtype == torch.float32
        allowed = 2 * distance(theirs, exact) + torch.finfo(torch.float32).eps
        assert distance(mine, exact) <= allowed, name
    return ours


def problem(batch, queries, keys, heads, width, bias_shape, seed=0):
    tensors = [
        draw(batch, queries, heads, width, seed=seed),
        draw(batch, keys, heads, width, seed=seed + 1),
        draw(batch, keys, heads, width, seed=seed + 2),
        None if bias_shape is None else draw(*bias_shape, seed=seed + 3),
    ]
    return tensors, draw(batch, queries, heads, width, seed=seed + 4)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width", "bias_shape"),
    [
        pytest.param(2, 197, 197, 2, 64, (2, 197, 197), id="BEiT at 224 pixels"),
        pytest.param(2, 50, 50, 2, 64, None, id="patches of 32, no bias"),
        pytest.param(3, 65, 65, 2, 32, (3, 1, 65, 65), id="a tile and one key, a bias an image"),
        pytest.param(1, 577, 577, 1, 64, (1, 577, 577), id="384 pixels, batch 1"),
        pytest.param(2, 36, 36, 3, 64, (3, 36, 36), id="5 x 7 grid"),
        pytest.param(2, 1, 40, 2, 48, (2, 1, 40), id="one query, padded heads"),
        pytest.param(2, 9, 128, 1, 128, (2, 1, 9, 128), id="whole tiles of keys, widest heads"),
        pytest.param(2, 7, 130, 2, 80, (7, 130), id="more keys than queries, one bias for all"),
        pytest.param(2, 24, 8, 2, 16, (1, 1, 1, 8), id="narrowest heads, a bias by key alone"),
        pytest.param(2, 4, 1, 1, 16, None, id="one key"),
    ],
)
def test_values_and_gradients(batch, queries, keys, heads, width, bias_shape) -> None:
    check(*problem(batch, queries, keys, heads, width, bias_shape))


@settings(max_examples=8)
@given(data=st.data())
def test_any_shape_and_any_broadcast(data) -> None:
    size = st.integers(1, 70)
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    queries, keys, width = data.draw(size), data.draw(size), data.draw(st.integers(1, 40))
    kept = [data.draw(st.booleans()) for _ in range(3)]
    full = (batch, heads, queries)
    shape = tuple(n if keep else 1 for n, keep in zip(full, kept, strict=True))
    tensors, dout = problem(batch, queries, keys, heads, width, (*shape, keys), seed=queries)
    check(tensors, dout, scale=data.draw(st.floats(0.05, 0.5)))


def test_a_bias_constant_along_keys_changes_nothing_and_has_no_gradient() -> None:
    tensors, dout = problem(2, 6, 33, 2, 16, (2, 6, 1))
    with_bias = results(lambda *x: attention(*x, impl="triton"), tensors, dout)
    without = results(lambda *x: attention(*x, impl="triton"), [*tensors[:3], None], dout)
    assert with_bias[4].shape == (2, 6, 1)
    # Sums of 33 terms of dS, each at most about 1 and rounded to 2**-24, over two images.
    assert with_bias[4].abs().max() < 2 * 33 * 2**-22
    for mine, theirs in zip(with_bias, without, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["sm_80", "sm_86", "sm_90", "sm_100"])
@pytest.mark.parametrize("bits", [16, 32])
def test_every_launch_choice_computes_the_same(family, bits, monkeypatch) -> None:
    from fastbeit_kernels._attention import arguments

    config = _configs.attention_config(family, bits, 64)
    monkeypatch.setattr(arguments, "attention_config", lambda *_: config)
    monkeypatch.setattr(arguments, "bias_slices", lambda *_: 2)  # 3 images: slices of 1 and 2
    check(*problem(3, 37, 70, 1, 24, (1, 37, 70)))


@pytest.mark.parametrize("bias", [True, False])
def test_query_subset(bias) -> None:
    """Rows of the bias follow the positions; empty slots are zero, whatever lies in them."""
    positions = torch.tensor([[3, 5, -1, 7, 2, 35], [-1, 1, 0, -1, 8, 2]], device=DEVICE)
    tensors, dout = problem(2, 6, 36, 2, 16, (2, 36, 36) if bias else None)
    empty = positions < 0
    clean = check(tensors, dout, positions=positions)
    assert (clean[0][empty] == 0).all() and (clean[1][empty] == 0).all()
    tensors[0][empty] = float("nan")
    dout[empty] = float("inf")
    poisoned = results(
        lambda *x: attention(*x, query_positions=positions, impl="triton"), tensors, dout
    )
    for mine, theirs in zip(poisoned, clean, strict=True):
        assert torch.equal(mine, theirs)
    if bias:
        unnamed = [row for row in range(36) if row not in positions]
        assert (clean[4][:, unnamed] == 0).all()


@pytest.mark.parametrize("rows", [[[4] * 40, list(range(40))], [[0, 1] * 20, [39, -1] * 20]])
def test_positions_may_repeat(rows) -> None:
    """Within a tile of queries (32 at a time) and across tiles; every repeat counts."""
    positions = torch.tensor(rows, device=DEVICE, dtype=torch.int32)
    tensors, dout = problem(2, 40, 40, 1, 16, (1, 40, 40))
    check(tensors, dout, positions=positions)


def test_packed_is_the_same_and_comes_back_packed() -> None:
    tensors, dout = problem(2, 40, 40, 2, 16, (2, 40, 40))
    qkv = torch.stack(tensors[:3], 2).requires_grad_()
    bias = tensors[3].clone().requires_grad_()
    out = attention_packed(qkv, bias, impl="triton")
    out.backward(dout)
    expected = results(lambda *x: attention(*x, impl="triton"), tensors, dout)
    assert qkv.grad is not None and qkv.grad.is_contiguous()
    found = [out, *qkv.grad.unbind(2), bias.grad]
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def as_views(tensor, kind):
    """The same values in other memory; around them NaN, so that an over-read shows."""
    batch, tokens, heads, width = tensor.shape
    if kind == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        memory = tensor.new_full((batch + 2, tokens + 3, heads + 1, width + 8), float("nan"))
        view = memory[1:-1, 2:-1, :heads, 8:]
    elif kind == "odd offset":
        memory = tensor.new_full((tensor.numel() + 3,), float("nan"))
        view = memory[3:].view(tensor.shape)
    else:
        memory = tensor.new_full((batch, tokens, heads, 2 * width), float("nan"))
        view = memory[..., ::2]
    return view.copy_(tensor)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "odd offset", "every second element"])
def test_views(kind) -> None:
    tensors, dout = problem(2, 40, 21, 2, 16, (2, 40, 21))
    expected = results(lambda *x: attention(*x, impl="triton"), tensors, dout)
    viewed = [as_views(x, kind) for x in tensors[:3]]
    bias = as_views(tensors[3][None], kind)[0]
    found = results(lambda *x: attention(*x, impl="triton"), [*viewed, bias], as_views(dout, kind))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_nothing_unwritten_is_read_and_everything_is_written(monkeypatch) -> None:
    """Fresh memory full of NaN gives the same bits."""
    positions = torch.tensor([[3, -1, 0], [1, 2, -1]], device=DEVICE)
    cases = [
        (problem(2, 37, 37, 2, 16, (2, 37, 37)), None),
        (problem(2, 3, 70, 1, 24, (1, 5, 70)), positions),
    ]

    def run(case):
        (tensors, dout), rows = case
        call = lambda *x: attention(*x, query_positions=rows, impl="triton")  # noqa: E731
        return results(call, tensors, dout)

    expected = [run(case) for case in cases]
    made = []

    def poisoned(function):
        def make(*args, **kwargs):
            tensor = function(*args, **kwargs)
            made.append(tensor)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return make

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    for case, before in zip(cases, expected, strict=True):
        for mine, theirs in zip(run(case), before, strict=True):
            assert torch.equal(mine, theirs)
    assert len(made) > 10


def test_gradients_repeat_bit_by_bit_and_images_do_not_see_each_other() -> None:
    tensors, dout = problem(5, 40, 40, 2, 16, (2, 40, 40))
    call = lambda *x: attention(*x, impl="triton")  # noqa: E731
    first, second = results(call, tensors, dout), results(call, tensors, dout)
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)
    alone = results(call, [*(x[3:4] for x in tensors[:3]), tensors[3]], dout[3:4])
    for mine, theirs in zip(alone[:4], first[:4], strict=True):
        assert torch.equal(mine, theirs[3:4])


def test_masks_by_minus_infinity() -> None:
    """Masked keys count nothing; a row with no key left is zero and passes no gradient."""
    tensors, dout = problem(1, 5, 20, 1, 16, (1, 5, 20))
    tensors[3][:, :, 12:] = float("-inf")
    short = [tensors[0], tensors[1][:, :12], tensors[2][:, :12], tensors[3][..., :12]]
    call = lambda *x: attention(*x, impl="triton")  # noqa: E731
    masked, expected = results(call, tensors, dout), results(call, short, dout)
    torch.testing.assert_close(masked[0], expected[0])
    torch.testing.assert_close(masked[2][:, :12], expected[2])
    assert (masked[2][:, 12:] == 0).all() and (masked[4][..., 12:] == 0).all()
    tensors[3][:, 2] = float("-inf")
    masked = results(call, tensors, dout)
    assert all(x.isfinite().all() for x in masked)
    assert (masked[0][:, 2] == 0).all() and (masked[1][:, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype) -> None:
    """Norm-wise. u is half a unit in the last place. The output is off by the rounding of P and of
    itself (u each) and of a bias of size 1 (u in the exponent); a gradient also by that of dS and
    of O in delta. On a device the bound is twice plain PyTorch's error."""
    tensors, dout = problem(2, 197, 197, 1, 64, (1, 197, 197))
    half = [*in_dtype(tensors[:3], dtype), tensors[3]]
    dout = dout.to(dtype)
    exact_inputs = [*in_dtype(half[:3], torch.float64), tensors[3].double()]
    ours = results(lambda *x: attention(*x, impl="triton"), half, dout)
    plain = results(lambda *x: attention(*x, impl="reference"), half, dout)
    truth = results(lambda *x: reference.attention(*x), exact_inputs, dout.double())
    u = torch.finfo(dtype).eps / 2
    assert ours[4].dtype == torch.float32
    for name, mine, theirs, exact in zip(NAMES, ours, plain, truth, strict=True):
        allowed = 2 * distance(theirs, exact) + u / 4 if DEVICE == "cuda" else 6 * u
        assert distance(mine, exact) <= allowed, name
