"""The convolution kernels against float64: every flag, shape, layout and precision.

Without a GPU they are interpreted; with one they run on it. The measure is plain PyTorch's own
error at the same precision: the kernels' may be at most twice as large, norm-wise, plus one
rounding of the result.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbeit_kernels import conv2d_channels_last, conv2d_pointwise_channels_last

pytest.importorskip("triton")

# Padding holds whatever was in memory, and NumPy warns of its infinities; nothing of it is kept.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GAIN = 1 / 9  # no power of two
FLAGS = [
    # relu_input, relu_output, bias, residual, gain
    pytest.param(True, True, True, False, 1.0, id="first of a block"),
    pytest.param(False, True, True, False, 1.0, id="inside a block"),
    pytest.param(False, False, True, True, GAIN, id="last of a block"),
    pytest.param(False, False, False, False, 1.0, id="bare"),
    pytest.param(True, True, False, True, GAIN, id="all but bias"),
]


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def distance(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


class Conv:
    """Arguments of one ``conv2d_channels_last``."""

    def __init__(self, batch, channels, outputs, height, width, side, flags, seed=0):
        self.relu_input, self.relu_output, bias, residual, self.gain = flags
        fan = (channels * side * side) ** 0.5
        self.tensors = [
            channels_last(draw(batch, channels, height, width, seed=seed)),
            channels_last(draw(outputs, channels, side, side, seed=seed + 1) / fan),
            draw(outputs, seed=seed + 2) if bias else None,
            channels_last(draw(batch, outputs, height, width, seed=seed + 3)) if residual else None,
        ]

    def run(self, impl, tensors=None):
        x, weight, bias, residual = tensors or self.tensors
        return conv2d_channels_last(
            x, weight, bias,
            residual=residual, gain=self.gain, relu_input=self.relu_input,
            relu_output=self.relu_output, impl=impl,
        )  # fmt: skip


class Pointwise:
    """Arguments of one ``conv2d_pointwise_channels_last``."""

    def __init__(self, batch, channels, hidden, outputs, height, width, flags, side=3, seed=0):
        _, self.relu_output, bias, residual, self.gain = flags
        self.tensors = [
            channels_last(draw(batch, channels, height, width, seed=seed)),
            channels_last(
                draw(hidden, channels, side, side, seed=seed + 1) / (channels * side**2) ** 0.5
            ),
            draw(hidden, seed=seed + 2) if bias else None,
            draw(outputs, hidden, 1, 1, seed=seed + 3) / hidden**0.5,
            draw(outputs, seed=seed + 4) if bias else None,
            channels_last(draw(batch, outputs, height, width, seed=seed + 5)) if residual else None,
        ]

    def run(self, impl, tensors=None):
        *most, residual = tensors or self.tensors
        return conv2d_pointwise_channels_last(
            *most, residual=residual, gain=self.gain, relu_output=self.relu_output, impl=impl
        )


def in_dtype(tensors, dtype):
    return [None if x is None else x.to(dtype) for x in tensors]


def check(call):
    """The kernel's fp32 result, having compared it."""
    ours, plain = call.run("triton"), call.run("reference")
    exact = call.run("reference", in_dtype(call.tensors, torch.float64))
    assert ours.shape == exact.shape and ours.dtype == torch.float32
    for result in (ours, plain):
        assert result.is_contiguous(memory_format=torch.channels_last)
    assert distance(ours, exact) <= 2 * distance(plain, exact) + torch.finfo(torch.float32).eps
    return ours


SHAPES = [
    pytest.param(1, 64, 64, 12, 12, 3, id="first group"),
    pytest.param(2, 20, 70, 5, 7, 3, id="odd sizes, padded channels, two output tiles"),
    pytest.param(3, 16, 16, 1, 1, 3, id="one pixel an image: edges only"),
    pytest.param(1, 8, 4, 3, 130, 3, id="rows longer than a tile"),
    pytest.param(2, 3, 8, 9, 6, 7, id="the first convolution, 7 x 7 of colours"),
    pytest.param(2, 33, 130, 4, 5, 1, id="1 x 1, partial chunks"),
    pytest.param(1, 1, 1, 4, 4, 5, id="one channel to one"),
]


@pytest.mark.parametrize(("batch", "channels", "outputs", "height", "width", "side"), SHAPES)
def test_shapes(batch, channels, outputs, height, width, side) -> None:
    flags = (True, False, True, True, GAIN)
    check(Conv(batch, channels, outputs, height, width, side, flags))


@pytest.mark.parametrize("flags", [param.values for param in FLAGS], ids=[p.id for p in FLAGS])
def test_flags(flags) -> None:
    check(Conv(2, 16, 24, 6, 5, 3, flags))
    check(Pointwise(2, 16, 24, 40, 6, 5, flags))


@pytest.mark.parametrize(
    ("batch", "channels", "hidden", "outputs", "height", "width", "side"),
    [
        pytest.param(1, 64, 64, 256, 6, 12, 3, id="first group"),
        pytest.param(1, 128, 128, 96, 6, 9, 3, id="second group's width"),
        pytest.param(2, 12, 20, 70, 5, 7, 3, id="hidden channels padded"),
        pytest.param(3, 5, 4, 3, 2, 3, 5, id="narrow, 5 x 5"),
        pytest.param(2, 16, 16, 16, 3, 3, 1, id="1 x 1 before 1 x 1"),
    ],
)
def test_fused_shapes(batch, channels, hidden, outputs, height, width, side) -> None:
    flags = (False, False, True, True, 1 / 64)
    check(Pointwise(batch, channels, hidden, outputs, height, width, flags, side))


@settings(max_examples=3)
@given(data=st.data())
def test_any_shape_and_any_flags(data) -> None:
    size = st.integers(1, 8)
    flags = [*(data.draw(st.booleans()) for _ in range(4)), data.draw(st.floats(-2, 2))]
    batch, height, width = (data.draw(size) for _ in range(3))
    channels, outputs = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 80))
    side = data.draw(st.sampled_from([1, 3, 5]))
    check(Conv(batch, channels, outputs, height, width, side, flags, seed=height))
    hidden = data.draw(st.integers(1, 40))
    check(Pointwise(batch, channels, hidden, outputs, height, width, flags, side, seed=width))


@pytest.mark.parametrize(
    ("family", "bits"), [("sm_80", 16), ("sm_86", 16), ("sm_90", 16), ("sm_100", 16), ("sm_90", 32)]
)
def test_every_launch_choice_computes_the_same(family, bits, monkeypatch) -> None:
    from fastbeit_kernels._convolution import arguments
    from fastbeit_kernels._convolution.configs import CONVOLUTION

    config = CONVOLUTION[family, bits]
    monkeypatch.setattr(arguments, "config_of", lambda *_: config)
    flags = (True, True, True, True, GAIN)
    for outputs in (40, 72):  # the narrow and the wide tile
        check(Conv(1, 36, outputs, 5, 4, 3, flags))
        check(Pointwise(1, 36, outputs, 72, 5, 4, flags))
    check(Conv(1, 36, 72, 5, 4, 1, flags))


def as_views(tensor, kind):
    """The same values in other memory; around them NaN, so that an over-read shows."""
    batch, channels, height, width = tensor.shape
    if kind == "channels first":
        return tensor.contiguous()
    if kind == "sliced":
        memory = tensor.new_full((batch + 1, height + 2, width + 3, channels + 8), float("nan"))
        view = memory[1:, 1:-1, 2:-1, 8:]
    elif kind == "odd offset":
        memory = tensor.new_full((tensor.numel() + 3,), float("nan"))
        view = memory[3:].view(batch, height, width, channels)
    elif kind == "rows and columns exchanged":
        memory = tensor.new_full((batch, width, height, channels), float("nan"))
        view = memory.transpose(1, 2)
    else:
        memory = tensor.new_full((batch, height, width, 2 * channels), float("nan"))
        view = memory[..., ::2]
    return view.permute(0, 3, 1, 2).copy_(tensor)


KINDS = [
    "channels first", "sliced", "odd offset", "rows and columns exchanged", "every second channel",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_views(kind) -> None:
    flags = (True, False, True, True, GAIN)
    for call in (Conv(2, 16, 24, 6, 5, 3, flags), Pointwise(2, 16, 24, 40, 6, 5, flags)):
        viewed = [as_views(x, kind) if x is not None and x.dim() == 4 else x for x in call.tensors]
        assert torch.equal(call.run("triton", viewed), call.run("triton"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_takes_views_too(kind) -> None:
    call = Conv(2, 16, 24, 6, 5, 3, (True, True, True, True, GAIN))
    viewed = [as_views(x, kind) if x.dim() == 4 else x for x in call.tensors]
    torch.testing.assert_close(call.run("reference", viewed), call.run("reference"))


def test_arguments_are_not_written_to() -> None:
    flags = (True, True, True, True, GAIN)
    for call in (Conv(2, 16, 24, 6, 5, 3, flags), Pointwise(2, 16, 24, 40, 6, 5, flags)):
        before = [x.clone() for x in call.tensors]
        for impl in ("triton", "reference"):
            call.run(impl)
            for tensor, was in zip(call.tensors, before, strict=True):
                assert torch.equal(tensor, was), impl


def test_nothing_unwritten_is_read_and_everything_is_written(monkeypatch) -> None:
    """Fresh memory full of NaN gives the same bits."""
    flags = (True, False, True, True, GAIN)
    calls = [Conv(2, 20, 70, 5, 7, 3, flags), Pointwise(2, 12, 20, 70, 5, 7, flags)]
    expected = [call.run("triton") for call in calls]
    made, real = [], torch.empty

    def poisoned(*arguments, **named):
        made.append(real(*arguments, **named).fill_(float("nan")))
        return made[-1]

    monkeypatch.setattr(torch, "empty", poisoned)
    for call, before in zip(calls, expected, strict=True):
        assert torch.equal(call.run("triton"), before)
    assert len(made) == 2


def test_results_repeat_bit_by_bit_and_images_do_not_see_each_other() -> None:
    flags = (True, False, True, True, GAIN)
    for call in (Conv(5, 16, 24, 6, 5, 3, flags), Pointwise(5, 16, 24, 40, 6, 5, flags)):
        first = call.run("triton")
        assert torch.equal(call.run("triton"), first)
        call.tensors[0][2] = float("nan")  # another image's trouble
        others = call.run("triton")
        assert others[2].isnan().all()
        keep = [0, 1, 3, 4]
        assert torch.equal(others[keep], first[keep])
        # The first, because NumPy's products differ with a row's place in the interpreted tile.
        alone = [x[:1] if x is not None and x.shape[0] == 5 else x for x in call.tensors]
        assert torch.equal(call.run("triton", alone), first[:1])


def test_infinite_and_not_a_number() -> None:
    """NaN passes ReLUs, as in PyTorch, and infinities don't reach padded channels."""
    flags = (True, True, True, False, 1.0)
    conv = Conv(1, 20, 24, 5, 5, 3, flags)
    conv.tensors[0][0, 3, 1, 1] = float("nan")
    ours, plain = conv.run("triton"), conv.run("reference")
    assert torch.equal(ours.isnan(), plain.isnan()) and 0 < plain.isnan().float().mean() < 1
    fused = Pointwise(1, 20, 24, 40, 5, 5, flags)
    fused.tensors[0][0, 3, 1, 1] = float("inf")
    fused.tensors[1].abs_()  # no infinity minus infinity: hidden channels are +inf
    fused.tensors[3].abs_()
    ours, plain = fused.run("triton"), fused.run("reference")
    assert torch.equal(ours.isinf(), plain.isinf()) and not ours.isnan().any()
    assert 0 < plain.isinf().float().mean() < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype) -> None:
    """Norm-wise. u is half a unit in the last place: the kernels round the result (and the hidden
    channels) once; the interpreter cuts bf16 off, which is up to 2 u. On a device the bound is
    twice plain PyTorch's error."""
    flags = (True, False, True, True, GAIN)
    u = torch.finfo(dtype).eps / 2
    for call, roundings in (
        (Conv(1, 64, 64, 10, 12, 3, flags), 1),
        (Pointwise(1, 64, 64, 256, 6, 10, flags), 2),
    ):
        half = in_dtype(call.tensors, dtype)
        ours, plain = call.run("triton", half), call.run("reference", half)
        exact = call.run("reference", in_dtype(half, torch.float64))
        assert ours.dtype == dtype
        allowed = 2 * distance(plain, exact) + u / 4 if DEVICE == "cuda" else 2 * roundings * u
        assert distance(ours, exact) <= allowed
