"""The implementation that was asked for reaches every operation; branches left to the next norm."""

from __future__ import annotations

import pytest
import torch

import fastbeit.model.attention_backends as attention_module
import fastbeit.model.block as block_module
import fastbeit.model.encoder as encoder_module
import fastbeit.model.mim as mim_module
import fastbeit.model.positions as positions_module
from fastbeit.model import Backends, BeitConfig, BeitForMim

CONFIG = BeitConfig(
    image_size=32, patch_size=8, width=32, depth=3, heads=2, vocab_size=24, layer_scale=0.3
)
POSITIONS = torch.tensor([[0, 5, 9, 15], [2, 3, -1, -1]], dtype=torch.int32)
TARGETS = torch.tensor([[3, 23, 0, 7], [9, 11, -5, 10**12]])
OPERATIONS = {
    "attention": attention_module,
    "attention_packed": attention_module,
    "bias_gelu": block_module,
    "scale_residual_layer_norm": block_module,
    "scale_residual": block_module,
    "expand_rel_pos_bias": positions_module,
    "embed_patches": encoder_module,
    "masked_linear_cross_entropy": mim_module,
}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str]]:
    """(operation, impl) of every call that the model makes; all run on the reference."""
    calls = []
    for name, module in OPERATIONS.items():
        real = getattr(module, name)

        def note(*arguments, impl, name=name, real=real, **options):
            calls.append((name, impl))
            return real(*arguments, impl="reference", **options)

        monkeypatch.setattr(module, name, note)
        if module is positions_module:  # the table of each block is expanded there
            monkeypatch.setattr(block_module, name, note)
    return calls


@pytest.mark.parametrize("position", ["relative", "relative_per_block"])
@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_the_named_implementation_reaches_every_operation(images, asked, impl, position) -> None:
    config = BeitConfig(**{**vars(CONFIG), "position": position})
    model = BeitForMim(config, seed=0, backends=Backends(kernels=impl))
    model.loss(images, POSITIONS, TARGETS).loss.backward()
    model.encode(images)
    # PyTorch's product adds its bias on the way; only where the kernel runs is it left to GELU.
    apart = set() if impl == "triton" else {"bias_gelu"}
    assert {name for name, _ in asked} == set(OPERATIONS) - apart
    assert {given for _, given in asked} == {impl}


def test_every_addition_of_a_step_is_one_with_the_norm_behind_it(images, asked) -> None:
    BeitForMim(CONFIG, seed=0).loss(images, POSITIONS, TARGETS)
    names = [name for name, _ in asked]
    assert names.count("scale_residual_layer_norm") == 2 * CONFIG.depth + 1
    assert "scale_residual" not in names


def test_an_unknown_implementation_is_refused(images) -> None:
    model = BeitForMim(CONFIG, seed=0, backends=Backends(kernels="fast"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="impl must be one of auto, triton, reference, got 'fast'"):
        model.features(images)


@pytest.mark.parametrize("layer_scale", [0.3, None])
def test_a_branch_left_to_the_next_norm_changes_no_bit(images, layer_scale) -> None:
    model = BeitForMim(BeitConfig(**{**vars(CONFIG), "layer_scale": layer_scale}), seed=0)
    bias = model.rel_pos()
    drop = torch.tensor([[1.25, 0.0, 1.0, 1.25, 0.0, 1.0], [0.0, 1.25, 1.25, 1.25, 1.0, 1.0]])
    x = at_once = model.embed(images, POSITIONS)
    pending = None
    for number, block in enumerate(model.blocks):
        factors = drop[:, 2 * number : 2 * number + 2]
        at_once = block(at_once, bias, factors)
        x, pending = block(x, bias, factors, pending=pending, defer=True)
    assert pending is not None
    assert torch.equal(block_module.add(x, pending, "auto"), at_once)
    model.loss(images, POSITIONS, TARGETS, drop_scale=drop).loss.backward()
    for block in model.blocks:
        for gamma in (block.gamma_1, block.gamma_2):
            assert (gamma is None) == (layer_scale is None)
            assert gamma is None or gamma.grad.ne(0).all()


def test_activation_checkpointing_of_blocks_changes_no_gradient(images) -> None:
    plain, frugal = BeitForMim(CONFIG, seed=0), BeitForMim(CONFIG, seed=0)
    frugal.set_checkpointing(True)
    for model in (plain, frugal):
        model.loss(images, POSITIONS, TARGETS).loss.backward()
    for (name, ours), theirs in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_step_on_the_kernels_alone_has_the_references_gradients(images) -> None:
    drop = torch.tensor([[1.25, 0.0, 1.0, 1.25, 0.0, 1.0], [0.0, 1.25, 1.25, 1.25, 1.0, 1.0]])
    gradients = []
    for impl in ("reference", "triton"):
        model = BeitForMim(CONFIG, seed=0, backends=Backends(kernels=impl))
        out = model.loss(images, POSITIONS, TARGETS, drop_scale=drop)
        out.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert out.count.item() == 6
    expected, found = gradients
    for name, gradient in found.items():
        # fp32 roundings of a few dozen operations; 1e-6 was seen.
        assert (gradient - expected[name]).norm() <= 2e-5 * expected[name].norm() + 1e-9, name
