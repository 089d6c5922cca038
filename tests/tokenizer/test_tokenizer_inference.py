"""The encoder as pre-training runs it: the bits of the plain one, and the kernels beside it."""

from __future__ import annotations

import pytest
import torch

from fastbeit.tokenizer import DvaeConfig, Tokenizer, inference, load_tokenizer
from fastbeit.tokenizer.dvae import Encoder, initialise

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Gains of 1/16 (folds exactly) and 1/9 (doesn't); a skip by 1 x 1 convolution and without one; the
# published kernel; hidden channels below, inside and above the table's.
CONFIGS = {
    "two groups": DvaeConfig(codes=40, widths=(64, 96)),
    "gain 1/9": DvaeConfig(codes=40, widths=(16, 64, 128), blocks_per_group=1, kernel=5),
    "wide": DvaeConfig(codes=24, widths=(544, 576), blocks_per_group=1, kernel=3, channels=1),
}


def encoder_of(name: str) -> Encoder:
    encoder = Encoder(CONFIGS[name])
    initialise(encoder, torch.Generator().manual_seed(len(name)))
    return encoder.to(DEVICE).requires_grad_(False)


def images_for(encoder: Encoder, batch: int = 2, dtype=torch.float32) -> torch.Tensor:
    side = 3 * encoder.config.stride
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(batch, encoder.config.channels, side, side + encoder.config.stride,
                        generator=generator)  # fmt: skip
    return images.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pytorch_gives_the_bits_of_the_plain_encoder(name, dtype) -> None:
    encoder = encoder_of(name).to(dtype).to(memory_format=torch.channels_last)
    images = images_for(encoder, dtype=dtype)
    before = images.clone()
    found = inference.features(encoder, images, "reference")
    assert torch.equal(found, encoder.features(images))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before), "the caller's images were written to"


@pytest.mark.parametrize("name", ["two groups", "gain 1/9"])
def test_triton_is_as_near_to_float64_as_the_plain_encoder(name) -> None:
    pytest.importorskip("triton")
    encoder = encoder_of(name).to(memory_format=torch.channels_last)
    images = images_for(encoder)
    plain = encoder.features(images)
    ours = inference.features(encoder, images, "triton")
    exact = encoder.double().features(images.double())
    error = lambda x: (x.double() - exact).norm() / exact.norm()  # noqa: E731
    assert error(ours) <= 2 * error(plain) + torch.finfo(torch.float32).eps
    assert not torch.equal(ours, plain), "the kernels can't have run"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_in_16_bits_rounds_no_worse_than_pytorch(dtype) -> None:
    """It rounds once where PyTorch rounds after the convolution and after the sum.

    The interpreter cuts bf16 off instead of rounding it, so there the bound is four blocks' cuts of
    the stream, 2 u each.
    """
    pytest.importorskip("triton")
    encoder = encoder_of("two groups").to(dtype).to(memory_format=torch.channels_last)
    images = images_for(encoder, dtype=dtype)
    plain = encoder.features(images)
    ours = inference.features(encoder, images, "triton")
    exact = encoder.double().features(images.double())
    error = lambda x: (x.double() - exact).norm() / exact.norm()  # noqa: E731
    assert ours.dtype == dtype
    # The roundings differ, so one may be luckier: a tenth more than PyTorch's own error.
    allowed = 1.1 * error(plain)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        allowed = 4 * 2 * torch.finfo(dtype).eps / 2
    assert error(ours) <= allowed


def test_implementations_are_chosen_one_instance_at_a_time(monkeypatch) -> None:
    pytest.importorskip("triton")
    calls = []
    for name in ("conv2d_channels_last", "conv2d_pointwise_channels_last"):
        real = getattr(inference, name)

        def seen(*arguments, _real=real, _name=name, **named):
            calls.append((_name, arguments[1].shape[0], named["impl"]))
            return _real(*arguments, **named)

        monkeypatch.setattr(inference, name, seen)
    plain, ours = load_tokenizer("demo", impl="reference"), load_tokenizer("demo", impl="triton")
    images = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    tokens = plain.encode(images)
    assert {impl for *_, impl in calls} == {"reference"}
    calls.clear()
    assert torch.equal(ours.encode(images), tokens)
    # Groups of 4, 16 and 32 hidden channels; the first is below the table.
    assert ("conv2d_pointwise_channels_last", 4, "reference") in calls
    for hidden in (16, 32):
        assert ("conv2d_channels_last", hidden, "triton") in calls
        assert ("conv2d_pointwise_channels_last", hidden, "triton") in calls
    assert all(impl == "triton" for _, channels, impl in calls if channels in (64, 128))
    assert ours.describe()["kernels"]["impl"] == "triton"
    runs = ours.describe()["kernels"]["runs"]
    assert "group_2.block_1, group_3.block_1" in runs and "group_1" not in runs
    assert load_tokenizer("demo").describe()["kernels"]["impl"] == "auto"


def test_what_the_published_encoder_gives_to_the_kernels() -> None:
    with torch.device("meta"):
        encoder = Encoder(DvaeConfig())
    runs = inference.chosen(encoder, "triton")["runs"]
    assert all(f"group_{g}.block_{b}" in runs for g in (1, 2) for b in (1, 2))
    assert "group_3" not in runs and "group_4" not in runs


def test_unknown_implementations_are_refused() -> None:
    with pytest.raises(ValueError, match="impl must be one of auto, triton, reference, got 'cuda'"):
        load_tokenizer("demo", impl="cuda")  # type: ignore[arg-type]


def test_triton_is_never_replaced_silently(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    tokenizer = load_tokenizer("demo", impl="triton")
    with pytest.raises(RuntimeError, match="impl='triton' was asked for, but"):
        tokenizer.encode(torch.rand(1, 3, 28, 28))


def test_autocast_and_gradients_around_it_change_nothing() -> None:
    """A training step may run under both; the tokenizer's dtype is its weights'."""
    tokenizer = load_tokenizer("demo")
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    alone = inference.features(tokenizer.encoder, images)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        inside = inference.features(tokenizer.encoder, images)
    assert inside.dtype == torch.float32 and torch.equal(inside, alone)
    assert not inside.requires_grad


def test_it_follows_the_weights() -> None:
    """Nothing is kept of weights that have changed since: cast, loaded anew, edited."""
    tokenizer = load_tokenizer("demo")
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    tokenizer.encode(images)
    encoder = Encoder(tokenizer.config)
    initialise(encoder, torch.Generator().manual_seed(1))
    expected = Tokenizer(encoder).encode(images)
    assert not torch.equal(tokenizer.encode(images), expected)
    tokenizer.encoder.load_state_dict(encoder.state_dict(), assign=True)
    assert torch.equal(tokenizer.encode(images), expected)
    half = tokenizer.to(torch.bfloat16)
    assert inference.features(half.encoder, images.bfloat16()).dtype == torch.bfloat16
