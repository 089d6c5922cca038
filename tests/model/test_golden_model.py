"""Features, logits, losses and every gradient of the official code (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fastbeit.interop import load_weights
from fastbeit.model import BeitClassifier, BeitConfig, BeitForMim

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5
SIZES = {"width": 64, "depth": 2, "heads": 2}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def load_golden(name: str, model, tmp_path) -> dict[str, torch.Tensor]:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    weights = {k.removeprefix("weights."): v for k, v in golden.items() if "weights." in k}
    save_file(weights, tmp_path / "official.safetensors")
    report = load_weights(model, tmp_path / "official.safetensors", "official")
    assert report.missing == report.resized == report.copied == ()
    return golden


def check_gradients(model, golden: dict[str, torch.Tensor]) -> None:
    left = {k.removeprefix("grads."): v for k, v in golden.items() if k.startswith("grads.")}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("qkv.bias"):
            q, k, v = parameter.grad.chunk(3)
            assert k.eq(0).all()
            found = {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            found = {name: parameter.grad}
        for official, gradient in found.items():
            assert relative_error(gradient, left.pop(official)) <= TOLERANCE, official
    assert not left


def slots_of(mask: torch.Tensor, tokens: torch.Tensor, slots: int):
    """Positions and targets in static slots; behind empty ones a token out of range."""
    positions = torch.full((len(mask), slots), -1, dtype=torch.int32)
    targets = torch.full((len(mask), slots), 10**9)
    for b, row in enumerate(mask):
        found = row.nonzero()[:, 0]
        positions[b, : len(found)] = found.int()
        targets[b, : len(found)] = tokens[b, found]
    return positions, targets


@pytest.mark.parametrize("slots", [75, 80], ids=["full", "with empty slots"])
@pytest.mark.parametrize("prune", [True, False], ids=["pruned", "whole"])
@pytest.mark.parametrize("name", ["pretrain_beit_plus", "pretrain_paper_vit"])
def test_pretraining(tmp_path, name, prune, slots) -> None:
    plus = name == "pretrain_beit_plus"
    config = BeitConfig(
        **SIZES,
        vocab_size=192,
        position="relative" if plus else "absolute",
        layer_scale=0.1 if plus else None,
    )
    model = BeitForMim(config)
    golden = load_golden(name, model, tmp_path)
    images, mask = golden["input.images"], golden["input.mask"]
    positions, targets = slots_of(mask, golden["input.tokens"], slots)

    features = model.features(images, positions)
    assert relative_error(features, golden["output.features"]) <= TOLERANCE
    logits = model(images, positions, prune=prune)
    assert relative_error(logits[positions >= 0], golden["output.logits"]) <= TOLERANCE
    assert logits[positions < 0].eq(0).all()

    loss, correct, count = model.loss(images, positions, targets, prune=prune)
    assert relative_error(loss, golden["output.loss"]) <= TOLERANCE
    best = golden["output.logits"].argmax(-1)
    assert correct.item() == (best == golden["input.tokens"][mask]).sum().item()
    assert count.item() == mask.sum().item()
    loss.backward()
    check_gradients(model, golden)


def test_classifier(tmp_path) -> None:
    model = BeitClassifier(BeitConfig(**SIZES, num_classes=10, position="relative_per_block"))
    golden = load_golden("finetune_classifier", model, tmp_path)
    logits = model(golden["input.images"])
    assert relative_error(logits, golden["output.logits"]) <= TOLERANCE
    loss = F.cross_entropy(logits, golden["input.labels"])
    assert relative_error(loss, golden["output.loss"]) <= TOLERANCE
    loss.backward()
    check_gradients(model, golden)


@pytest.mark.parametrize(
    ("kind", "changes", "count"),
    [
        (BeitForMim, {}, 91_965_776),
        (BeitForMim, {"position": "absolute", "layer_scale": None}, 92_089_856),
        (BeitClassifier, {"position": "relative_per_block"}, 86_530_984),
    ],
)
def test_parameter_counts_of_the_base_models(kind, changes, count) -> None:
    with torch.device("meta"):
        model = kind(BeitConfig(**changes))
    assert model.parameter_count() == count
