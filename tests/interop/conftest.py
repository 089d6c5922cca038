"""Small models with every parameter drawn, so that no name can be left out unseen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastbeit.model import BeitClassifier, BeitConfig, BeitForMim

sys.path.insert(0, str(Path(__file__).parents[1]))  # peer_models.py

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "vocab_size": 20,
    "num_classes": 10,
}


def randomise(model):
    """Every parameter from a normal, norms about one; the key third of a qkv bias stays zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if ("norm" in name and name.endswith("weight")) or "gamma" in name:
                parameter.add_(1)
            if name.endswith("qkv.bias"):
                parameter.unflatten(0, (3, -1))[1] = 0
    return model.eval()


@pytest.fixture
def make_mim():
    def make(**changes) -> BeitForMim:
        return randomise(BeitForMim(BeitConfig(**{**SIZES, **changes}), seed=0))

    return make


@pytest.fixture
def make_classifier():
    def make(**changes) -> BeitClassifier:
        config = BeitConfig(**{**SIZES, "position": "relative_per_block", **changes})
        return randomise(BeitClassifier(config, seed=0))

    return make


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(9))
