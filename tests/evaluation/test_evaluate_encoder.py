"""The whole comparison, on images whose class one encoder sees and the other doesn't."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastbeit.evaluation import evaluate_encoder
from fastbeit.model import BeitConfig, BeitForMim


class Source:
    """Noise images; the class is which of two corners is brighter, by less than the noise."""

    def __init__(self, samples, seed, classes=("left", "right")):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, 2, size=samples)
        self.classes = list(classes)
        self.files = []
        for label in self.labels:
            pixels = rng.integers(60, 190, size=(8, 8, 3), dtype=np.uint8)
            pixels[:4, 4 * label : 4 * label + 4] += 60
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            self.files.append(buffer.getvalue())

    def __len__(self):
        return len(self.files)

    def read(self, index):
        return self.files[index]

    def name(self, index):
        return f"{index}.png"


class Encoder(torch.nn.Module):
    """Block 1 is constant noise; block 2 knows the corners when ``sees`` is set."""

    def __init__(self, sees):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.sees = sees
        self.config = SimpleNamespace(image_hw=(8, 8), in_channels=3)

    def layer_features(self, images):
        generator = torch.Generator().manual_seed(0)
        corners = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4).flatten(2).mT
        noise = torch.randn(len(images), 5, 2, generator=generator)
        signal = noise.clone()
        if self.sees:
            signal[:, 1:, 0] = corners[:, :, 0] * torch.tensor([1.0, -1.0, 0, 0]) * 50
        return [noise * self.weight, signal * self.weight]


def _sources():
    return {
        "train": Source(300, 0),
        "validation": Source(120, 1),
        "test": Source(150, 2),
    }


def test_trained_random_and_pixels_are_told_apart():
    half = (0.5, 0.5, 0.5)
    result = evaluate_encoder(Encoder(True), Encoder(False), _sources(), mean=half, std=half)
    assert result.trained.probe_accuracy > 0.95
    assert (result.trained.probe_layer, result.trained.probe_pooling) == (2, "mean")
    assert result.trained.knn_accuracy > 0.9
    assert result.random.probe_accuracy < 0.7
    assert result.probe_gain == result.trained.probe_accuracy - result.random.probe_accuracy
    assert result.pixels.probe_layer is None and len(result.pixels.probe_curve) == 1
    assert result.beats_pixels == (result.trained.probe_accuracy > result.pixels.probe_accuracy)
    assert result.samples == {"train": 300, "validation": 120, "test": 150}
    assert result.classes == 2 and result.bad_images == 0
    saved = json.loads(json.dumps(result.to_dict()))
    assert saved["trained"]["probe_curve"] == result.trained.probe_curve
    table = result.table().splitlines()
    assert len(table) == 5 and "150 images, 2 classes (standard error at most 4.1)" in table[0]
    assert table[3].startswith("trained encoder") and "block 2, mean" in table[3]
    assert f"{100 * result.pixels.probe_accuracy:.1f}" in table[4]


def test_limits_apply_a_split_and_repeat():
    half = (0.5, 0.5, 0.5)
    limits = {"train": 100, "validation": 50, "test": None}
    arguments = (Encoder(True), Encoder(False), _sources())
    first = evaluate_encoder(*arguments, mean=half, std=half, limits=limits, seed=1)
    again = evaluate_encoder(*arguments, mean=half, std=half, limits=limits, seed=1)
    assert first.samples == {"train": 100, "validation": 50, "test": 150}
    assert first.trained == again.trained and first.pixels == again.pixels


def test_a_real_encoder_goes_through():
    config = BeitConfig(image_size=8, patch_size=4, width=16, depth=2, heads=2, vocab_size=8)
    models = [BeitForMim(config, seed=seed) for seed in (0, 1)]
    half = (0.5, 0.5, 0.5)
    result = evaluate_encoder(*models, _sources(), mean=half, std=half)
    assert len(result.trained.probe_curve) == 2 and len(result.trained.probe_curve[0]) == 2
    assert 0.4 < result.trained.probe_accuracy <= 1.0
    assert all(p.grad is None for p in models[0].parameters())


def test_splits_must_be_there_and_share_their_classes():
    sources = _sources()
    half = (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"missing: \['test'\]"):
        rest = {name: sources[name] for name in ("train", "validation")}
        evaluate_encoder(Encoder(True), Encoder(False), rest, mean=half, std=half)
    sources["test"] = Source(50, 3, classes=("right", "left"))
    with pytest.raises(ValueError, match="same classes in the same order"):
        evaluate_encoder(Encoder(True), Encoder(False), sources, mean=half, std=half)
