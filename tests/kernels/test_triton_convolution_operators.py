"""The convolutions as public functions and registered operators: compilation, refusals, limits."""

from __future__ import annotations

import re

import pytest
import torch
from torch.library import opcheck

from fastbeit_kernels import conv2d_channels_last, conv2d_pointwise_channels_last

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    tensor = torch.randn(*shape, generator=generator).to(DEVICE)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


X, WEIGHT, BIAS = draw(1, 16, 4, 5), draw(24, 16, 3, 3), draw(24)
POINTWISE, POINTWISE_BIAS, SKIP = draw(40, 24, 1, 1), draw(40), draw(1, 40, 4, 5)


def fused(x=X, weight=WEIGHT, bias=BIAS, pointwise=POINTWISE, second=POINTWISE_BIAS, **named):
    return conv2d_pointwise_channels_last(x, weight, bias, pointwise, second, **named)


def test_opcheck() -> None:
    pytest.importorskip("triton")
    from fastbeit_kernels._convolution import ops

    opcheck(ops.conv_forward, (X, WEIGHT, BIAS, None, 1.0, True, True))
    opcheck(ops.conv_forward, (X.contiguous(), WEIGHT, None, draw(1, 24, 4, 5), 0.5, False, False))
    arguments = (X, WEIGHT, BIAS, POINTWISE, POINTWISE_BIAS, SKIP, 0.5, False)
    opcheck(ops.conv_pointwise_forward, arguments)


# PyTorch's compiler imports deprecated parts of PyTorch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_compiles_into_one_graph(impl) -> None:
    pytest.importorskip("triton")

    def model(x):
        y = conv2d_channels_last(x * 2, WEIGHT, BIAS, relu_input=True, impl=impl)
        z = fused(x, residual=SKIP, gain=0.5, impl=impl)
        return y.sum() + z

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))


def test_filters_and_pixels_in_channels_last_memory_are_not_copied(monkeypatch) -> None:
    """The layout that the kernels want is made once, by whoever holds the weights."""
    pytest.importorskip("triton")
    from fastbeit_kernels._convolution import arguments

    launches = []
    for name in ("conv_launch", "conv_pointwise_launch"):
        real = getattr(arguments, name)

        def seen(*tensors, _real=real, **named):
            launches.append(_real(*tensors, **named))
            return launches[-1]

        monkeypatch.setattr(arguments, name, seen)
    conv2d_channels_last(X, WEIGHT, BIAS, impl="triton")
    fused(residual=SKIP, impl="triton")
    plain, whole = (launch.arguments for launch in launches)
    for found in (plain, whole):
        assert found["input_ptr"].data_ptr() == X.data_ptr()
        assert found["filter_ptr"].data_ptr() == WEIGHT.data_ptr()
    assert whole["pointwise_ptr"].data_ptr() == POINTWISE.data_ptr()
    assert whole["residual_ptr"].data_ptr() == SKIP.data_ptr()


def test_autocast_changes_nothing() -> None:
    pytest.importorskip("triton")
    for impl in ("triton", "reference"):
        alone = conv2d_channels_last(X, WEIGHT, BIAS, impl=impl)
        with torch.autocast(DEVICE, torch.bfloat16):
            inside = conv2d_channels_last(X, WEIGHT, BIAS, impl=impl)
        assert inside.dtype == torch.float32 and torch.equal(inside, alone)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_gradients_are_refused(impl) -> None:
    wanting = WEIGHT.clone().requires_grad_()
    message = "has no gradient, and an argument requires one: call it under torch.no_grad()"
    with pytest.raises(ValueError, match=re.escape(f"conv2d_channels_last {message}")):
        conv2d_channels_last(X, wanting, impl=impl)
    with pytest.raises(ValueError, match=re.escape(f"conv2d_pointwise_channels_last {message}")):
        fused(residual=SKIP.clone().requires_grad_(), impl=impl)
    if impl == "triton":
        pytest.importorskip("triton")
    with torch.no_grad():
        found = conv2d_channels_last(X, wanting, BIAS, impl=impl)
    assert not found.requires_grad
    assert torch.equal(found, conv2d_channels_last(X, WEIGHT, BIAS, impl=impl))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv2d_channels_last(X[0], WEIGHT), "x must be [B, C, H, W], got [16, 4, 5]"),
        (
            lambda: conv2d_channels_last(X, WEIGHT[:, :8]),
            "weight must be [O, 16, k, k], got [24, 8, 3, 3]",
        ),
        (
            lambda: conv2d_channels_last(X, WEIGHT[..., :2]),
            "weight must be square with an odd side, got 3 x 2",
        ),
        (
            lambda: conv2d_channels_last(X, WEIGHT[..., :2, :2]),
            "weight must be square with an odd side, got 2 x 2",
        ),
        (
            lambda: conv2d_channels_last(X, WEIGHT[:0]),
            "weight must not be empty, got [0, 16, 3, 3]",
        ),
        (lambda: conv2d_channels_last(X, WEIGHT, BIAS[:3]), "bias must be [24], got [3]"),
        (
            lambda: conv2d_channels_last(X, WEIGHT, residual=SKIP),
            "residual must be [1, 24, 4, 5], got [1, 40, 4, 5]",
        ),
        (
            lambda: conv2d_channels_last(X, WEIGHT, BIAS.half()),
            "x, weight, bias must have one dtype, got x torch.float32",
        ),
        (
            lambda: conv2d_channels_last(X, WEIGHT.to("meta")),
            "weight is on meta, the other arguments",
        ),
        (
            lambda: fused(pointwise=POINTWISE[:, :8]),
            "pointwise_weight must be [O, 24, 1, 1], got [40, 8, 1, 1]",
        ),
        (lambda: fused(second=BIAS), "pointwise_bias must be [40], got [24]"),
        (lambda: fused(pointwise=POINTWISE.half()), "x, pointwise_weight must have one dtype"),
        (
            lambda: fused(residual=X),
            "residual must be [1, 40, 4, 5], got [1, 16, 4, 5]",
        ),
        (
            lambda: conv2d_channels_last(X, WEIGHT, impl="cuda"),  # type: ignore[arg-type]
            "conv2d_channels_last: impl must be one of auto, triton, reference, got 'cuda'",
        ),
    ],
)
def test_refusals_say_what_was_expected_and_what_came(call, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_what_the_kernels_cannot_do_is_refused_or_left_to_the_reference() -> None:
    pytest.importorskip("triton")
    many = draw(136, 16, 3, 3)
    cases = [
        ((X.double(), WEIGHT.double()), "float32, float16 and bfloat16, and x is torch.float64"),
        ((X[:0], WEIGHT), "there is nothing to compute: x is empty"),
        ((X.expand(1, 16, 4, 5), many, None, draw(8, 136, 1, 1), None), "up to 128 hidden"),
    ]
    for arguments, message in cases:
        call = conv2d_channels_last if len(arguments) == 2 else conv2d_pointwise_channels_last
        with pytest.raises(ValueError, match=message):
            call(*arguments, impl="triton")
        outputs = arguments[-2].shape[0] if len(arguments) == 5 else arguments[1].shape[0]
        x = arguments[0]
        assert call(*arguments).shape == (x.shape[0], outputs, *x.shape[2:])


def test_offsets_that_leave_32_bits_are_refused() -> None:
    pytest.importorskip("triton")
    one, filters = torch.zeros(1, 1, 1, 1, device=DEVICE), WEIGHT[..., :1, :1]
    with pytest.raises(ValueError, match="rows of up to 33554432 numbers, and one has 67108864"):
        conv2d_channels_last(one.expand(1, 16, 1, 2**22), filters[:16], impl="triton")
    with pytest.raises(ValueError, match="images of up to 2"):
        conv2d_channels_last(one.expand(1, 16, 2**11, 2**20), filters, impl="triton")
    with pytest.raises(ValueError, match="filters of up to 49 x 49"):
        conv2d_channels_last(X, one.expand(4, 16, 51, 51), impl="triton")


def test_rows_far_apart_are_copied() -> None:
    """A view whose rows are further apart than 32 bits can step over."""
    pytest.importorskip("triton")
    from fastbeit_kernels._convolution import ops

    near = X.expand(1, 16, 4, 5)
    assert ops.channels_last(near) is near
    memory = torch.empty(1, device="meta").as_strided((1, 2, 5, 16), (0, 2**26, 16, 1))
    far = memory.permute(0, 3, 1, 2)
    assert ops.channels_last(far).stride(2) == 5 * 16


def test_impl_is_obeyed_or_refused(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, call in (
        ("conv2d_channels_last", lambda **a: conv2d_channels_last(X, WEIGHT, **a)),
        ("conv2d_pointwise_channels_last", fused),
    ):
        assert torch.equal(call(), call(impl="reference"))
        if DEVICE == "cpu":
            with pytest.raises(RuntimeError, match=f"{name}: impl='triton' was asked for"):
                call(impl="triton")
