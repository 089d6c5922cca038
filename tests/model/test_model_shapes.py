"""Sizes, memory formats and precisions that the model takes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fastbeit.model import BeitClassifier, BeitConfig, BeitForMim

SMALL = {"width": 32, "depth": 2, "heads": 2, "vocab_size": 24, "num_classes": 7}


@pytest.mark.parametrize("position", ["relative", "relative_per_block", "absolute", "none"])
@pytest.mark.parametrize(
    ("image_size", "patch", "channels", "patches"),
    [(28, 4, 1, 49), ((48, 32), 16, 3, 6), (24, 8, 12, 9), ((8, 40), 8, 2, 5), (8, 8, 3, 1)],
    ids=["grey digits", "upright", "many channels", "one row", "one patch"],
)
def test_sizes(image_size, patch, channels, patches, position) -> None:
    config = BeitConfig(
        image_size=image_size, patch_size=patch, in_channels=channels, position=position, **SMALL
    )
    assert (config.patches, config.tokens) == (patches, patches + 1)
    images = torch.randn(2, channels, *config.image_hw)
    model = BeitForMim(config, seed=0)
    positions = torch.tensor([[patches - 1, -1], [0, -1]], dtype=torch.int32)
    assert model(images, positions).shape == (2, 2, 24)
    out = model.loss(images, positions, torch.zeros(2, 2, dtype=torch.int64))
    out.loss.backward()
    assert out.count.item() == 2 and out.loss.isfinite()
    assert model.features(images).shape == (2, patches + 1, 32)
    classifier = BeitClassifier(config, seed=0)
    assert classifier(images).shape == (2, 7)
    assert classifier(images, drop_scale=torch.ones(2, 4)).shape == (2, 7)


def test_patches_are_numbered_in_raster_order_of_a_wide_grid() -> None:
    config = BeitConfig(image_size=(16, 24), patch_size=8, position="none", **SMALL)
    model = BeitForMim(config, seed=0)
    images = torch.zeros(1, 3, 16, 24)
    images[..., 8:, 8:16] = 1  # second row, second of three
    tokens = model.embed(images, None)[0, 1:]
    lit = [i for i in range(6) if not torch.equal(tokens[i], tokens[0])]
    assert lit == [4]


def test_memory_format_of_images_is_free() -> None:
    model = BeitForMim(BeitConfig(image_size=32, patch_size=8, **SMALL), seed=0)
    images = torch.randn(2, 3, 32, 32)
    expected = model.features(images)
    wide = torch.randn(2, 3, 32, 64)
    wide[..., ::2] = images
    for other in (images.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        torch.testing.assert_close(model.features(other), expected)


@pytest.mark.parametrize("position", ["relative", "relative_per_block", "absolute"])
def test_bf16_autocast_is_near_fp32_with_fp32_gradients(position) -> None:
    config = BeitConfig(image_size=32, patch_size=8, position=position, **SMALL)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(8, dtype=torch.int32).repeat(4, 1)
    targets = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(1))
    arguments = (images, positions, targets)
    options = {"drop_scale": torch.full((4, 4), 1.25)}
    exact = BeitForMim(config, seed=0)
    exact.loss(*arguments, **options).loss.backward()
    model = BeitForMim(config, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(*arguments, **options).loss
    assert loss.dtype == torch.float32
    loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        # bf16 keeps 8 bits: 0.4 % a rounding, a few dozen of them on the way.
        assert (ours.grad - theirs.grad).norm() <= 0.03 * theirs.grad.norm() + 1e-9, name


def test_bf16_model_keeps_the_shared_bias_in_fp32() -> None:
    model = BeitForMim(BeitConfig(image_size=32, patch_size=8, **SMALL), seed=0)
    model.bfloat16().rel_pos.float()
    seen = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(
            lambda module, inputs: seen.append([x.dtype for x in inputs[:2]])
        )
    images = torch.randn(2, 3, 32, 32).bfloat16()
    positions = torch.zeros(2, 1, dtype=torch.int32)
    out = model.loss(images, positions, torch.zeros(2, 1).long(), drop_scale=torch.ones(2, 4))
    out.loss.backward()
    assert seen == [[torch.bfloat16, torch.float32]] * 2
    assert model.rel_pos.relative_position_bias_table.grad.dtype == torch.float32


# The tracer makes an instance of every autograd.Function that it meets, and that warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_whole_loss_traces_as_one_static_graph() -> None:
    """So nothing in it waits for data: no .item(), no nonzero, no boolean selection."""
    model = BeitForMim(BeitConfig(image_size=32, patch_size=8, **SMALL), seed=0)
    images = torch.randn(2, 3, 32, 32)
    positions = torch.tensor([[0, 5, -1], [2, -1, -1]], dtype=torch.int32)
    targets = torch.tensor([[1, 2, 10**9], [3, -1, -1]])
    drop = torch.tensor([[1.0, 0.0, 1.25, 1.25], [1.0, 1.0, 0.0, 1.25]])
    expected = model.loss(images, positions, targets, drop_scale=drop)
    expected.loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    traced = torch.compile(model.loss, fullgraph=True, backend="aot_eager", dynamic=False)
    out = traced(images, positions, targets, drop_scale=drop)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "image_size must be a multiple of patch_size 16, got 30x30"),
        ({"image_size": (32, 40)}, "image_size must be a multiple of patch_size 16, got 32x40"),
        ({"heads": 5}, "heads must divide width 768, got 5 heads"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"position": "rotary"}, "position must be relative, .* got 'rotary'"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1"),
        ({"mlp_ratio": 0}, "mlp_ratio must leave a hidden feature, got 0"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
    ],
)
def test_configs_that_are_no_model_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        BeitConfig(**changes)


def test_inputs_that_do_not_fit_are_refused() -> None:
    config = BeitConfig(image_size=32, patch_size=8, **SMALL)
    model, images = BeitForMim(config, seed=0), torch.zeros(2, 3, 32, 32)
    slots = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, 32\], got \[2, 3, 40, 32\]"):
        model.features(torch.zeros(2, 3, 40, 32))
    with pytest.raises(ValueError, match=r"positions must be \[B, M\] with B = 2, got \[3, 4\]"):
        model.features(images, torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"got torch\.bool; a boolean mask is turned"):
        model.features(images, torch.zeros(2, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"targets must be \[B, M\] = \[2, 4\], got \[2, 3\]"):
        model.loss(images, slots, torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"drop_scale must be .* = \[2, 4\], got \[2, 2\]"):
        model.loss(images, slots, slots.long(), drop_scale=torch.ones(2, 2))
    with pytest.raises(ValueError, match="BeitClassifier has no mask token"):
        BeitClassifier(config).encode(images, slots)
