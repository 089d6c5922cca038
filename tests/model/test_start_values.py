"""Initialisation: the recipe's distributions, from a generator of the model's own."""

from __future__ import annotations

import math

import pytest
import torch

from fastbeit.model import BeitClassifier, BeitConfig, BeitForMim

CONFIG = BeitConfig(
    image_size=32, patch_size=8, width=128, depth=4, heads=4, vocab_size=300, position="absolute"
)
# Standard deviation of a normal of deviation 0.02 cut at one sigma.
CUT_STD = 0.02 * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(0.5**0.5))


def test_weights_are_normals_cut_at_one_sigma() -> None:
    model = BeitForMim(CONFIG, seed=0)
    scaled = {
        f"blocks.{i}.{name}.weight": math.sqrt(2 * (i + 1))
        for i in range(4)
        for name in ("attn.proj", "mlp.fc2")
    }
    drawn = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach() * scaled.get(name, 1.0)
        if name.endswith("bias"):
            assert values.eq(0).all(), name
        elif "norm" in name:
            assert values.eq(1).all(), name
        elif "gamma" in name:
            assert values.eq(torch.tensor(0.1)).all(), name
        else:
            drawn += 1
            assert values.abs().max() <= 0.02 * (1 + 1e-6), name
            assert values.std().item() == pytest.approx(CUT_STD, rel=0.15), name
            if values.numel() > 10_000:
                assert values.abs().max() > 0.0199, name
                assert values.std().item() == pytest.approx(CUT_STD, rel=0.02), name
                # Denser in the middle than a uniform (0.5), as a cut normal is.
                inner = (values.abs() < 0.01).float().mean().item()
                assert inner == pytest.approx(math.erf(0.5**1.5) / math.erf(0.5**0.5), abs=0.01)
    assert drawn == 4 * 4 + 5  # qkv, proj, fc1, fc2; patches, CLS, mask, positions, head


def test_relative_tables_start_at_zero_and_classifier_heads_small() -> None:
    model = BeitClassifier(BeitConfig(position="relative_per_block", depth=1, layer_scale=1e-5))
    assert model.blocks[0].attn.relative_position_bias_table.eq(0).all()
    assert model.blocks[0].gamma_2.eq(torch.tensor(1e-5)).all()
    assert 1e-5 < model.head.weight.abs().max() <= 0.02 * 0.001 * (1 + 1e-6)
    assert BeitForMim(BeitConfig(depth=1, vocab_size=4)).rel_pos().eq(0).all()


def test_a_seed_fixes_the_values_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = BeitForMim(CONFIG, seed=5)
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(99)
    again, other = BeitForMim(CONFIG, seed=5), BeitForMim(CONFIG, seed=6)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    torch.manual_seed(1)
    one = BeitForMim(CONFIG).lm_head.weight
    torch.manual_seed(1)
    assert torch.equal(BeitForMim(CONFIG).lm_head.weight, one)
    assert not torch.equal(BeitForMim(CONFIG).lm_head.weight, one)
