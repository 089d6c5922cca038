"""Is the encoder any good? Linear probe and kNN on frozen features, beside two yardsticks.

    result = evaluate_encoder(model, random_model, sources, mean=mean, std=std)
    print(result.table())

The trained encoder is compared with the same architecture at its random initialisation and with
raw pixels: an encoder that doesn't beat both has learned little that a classifier can use.
Choices (block, pooling, strength) are made on the validation split, results are the test split's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
from torch import nn

from fastbeit.data.source import Source
from fastbeit.evaluation.features import (
    POOLINGS,
    LabelledImages,
    extract_features,
    load_images,
    raw_pixels,
)
from fastbeit.evaluation.knn import NEIGHBOURS, knn
from fastbeit.evaluation.probe import ProbeResult, Split, linear_probe

__all__ = [
    "EncoderScore",
    "EvaluationResult",
    "LabelledImages",
    "ProbeResult",
    "Split",
    "evaluate_encoder",
    "extract_features",
    "knn",
    "linear_probe",
    "load_images",
    "raw_pixels",
]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class EncoderScore:
    """One row of the comparison; accuracies are shares, 0 to 1, blocks count from 1.

    Attributes:
        name: "trained encoder", "random encoder" or "raw pixels".
        probe_accuracy: linear probe, test split.
        probe_layer, probe_pooling: chosen on the validation split; None for raw pixels.
        probe_l2: chosen regularisation.
        probe_curve: ``[L][2]`` validation accuracy by block and pooling (CLS, patch mean).
        knn_accuracy, knn_layer, knn_pooling, knn_curve: the same for kNN.
    """

    name: str
    probe_accuracy: float
    probe_layer: int | None
    probe_pooling: str | None
    probe_l2: float
    probe_curve: list[list[float]]
    knn_accuracy: float
    knn_layer: int | None
    knn_pooling: str | None
    knn_curve: list[list[float]]


@dataclass(frozen=True)
class EvaluationResult:
    """The comparison, and what it was made on.

    Attributes:
        trained, random, pixels: the rows.
        samples: images used of each split.
        classes: number of classes.
        bad_images: images left out because they can't be decoded.
        probe_gain: trained minus random probe accuracy, a share.
        beats_pixels: whether the trained encoder's probe is above the raw pixels'.
        seconds: time taken.
    """

    trained: EncoderScore
    random: EncoderScore
    pixels: EncoderScore
    samples: dict[str, int]
    classes: int
    bad_images: int
    probe_gain: float
    beats_pixels: bool
    seconds: float

    @property
    def scores(self) -> tuple[EncoderScore, EncoderScore, EncoderScore]:
        """The rows in the order of the table."""
        return self.random, self.trained, self.pixels

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for summary.json and the report."""
        return asdict(self)

    def table(self) -> str:
        """The comparison as plain text, five lines."""
        error = 100 * sqrt(0.25 / self.samples["test"])
        lines = [
            f"test accuracy in %, {self.samples['test']} images, {self.classes} classes "
            f"(standard error at most {error:.1f})",
            f"{'':16}  {'probe':>6}  {'chosen':<18}  {f'{NEIGHBOURS}-NN':>6}  chosen",
        ]
        for row in self.scores:
            probe_at = _where(row.probe_layer, row.probe_pooling)
            knn_at = _where(row.knn_layer, row.knn_pooling)
            lines.append(
                f"{row.name:16}  {100 * row.probe_accuracy:6.1f}  {probe_at:<18}  "
                f"{100 * row.knn_accuracy:6.1f}  {knn_at}".rstrip()
            )
        return "\n".join(lines)


def evaluate_encoder(
    model: nn.Module,
    random_model: nn.Module,
    sources: Mapping[str, Source],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    limits: Mapping[str, int | None] | None = None,
    seed: int = 0,
    batch_size: int = 250,
) -> EvaluationResult:
    """Probe and kNN of ``model``, of ``random_model`` and of raw pixels.

    Args:
        model: the trained encoder: ``config`` and ``layer_features(images) -> L x [B, T, D]``.
        random_model: the same architecture, not trained.
        sources: labelled sources "train", "validation" and "test" with the same classes.
        mean, std: normalisation of the images, a value a channel, as in training.
        limits: most images to use of each split, drawn with ``seed``; default 10,000 for training
            and 5,000 for each of the others.
        batch_size: images a forward pass.

    Raises:
        ValueError: a split missing or without labels, or splits with different classes.
    """
    started_s = time.perf_counter()
    limits = {"train": 10_000, "validation": 5_000, "test": 5_000} if limits is None else limits
    missing = [name for name in SPLITS if name not in sources]
    if missing:
        raise ValueError(f"evaluation needs the splits {', '.join(SPLITS)}; missing: {missing}")
    classes = {name: sources[name].classes for name in SPLITS}
    if any(classes[name] != classes["train"] for name in SPLITS):
        raise ValueError(
            "the splits must have the same classes in the same order, got "
            + "; ".join(f"{name}: {classes[name]}" for name in SPLITS)
        )
    config: Any = model.config
    images = {
        name: load_images(
            sources[name],
            size=config.image_hw,
            channels=config.in_channels,
            limit=limits.get(name),
            seed=seed,
        )
        for name in SPLITS
    }

    def features(encoder: nn.Module) -> list[Split]:
        return [
            Split(
                extract_features(
                    encoder, images[name].pixels, mean=mean, std=std, batch_size=batch_size
                ),
                images[name].labels,
            )
            for name in SPLITS
        ]

    trained = _score("trained encoder", features(model))
    random = _score("random encoder", features(random_model))
    pixels = _score(
        "raw pixels",
        [Split(raw_pixels(images[name].pixels), images[name].labels) for name in SPLITS],
    )
    return EvaluationResult(
        trained=trained,
        random=random,
        pixels=pixels,
        samples={name: len(images[name].labels) for name in SPLITS},
        classes=len(np.unique(images["train"].labels)),
        bad_images=sum(len(images[name].bad) for name in SPLITS),
        probe_gain=trained.probe_accuracy - random.probe_accuracy,
        beats_pixels=trained.probe_accuracy > pixels.probe_accuracy,
        seconds=time.perf_counter() - started_s,
    )


def _score(name: str, splits: list[Split]) -> EncoderScore:
    probe, neighbours = linear_probe(*splits), knn(*splits)
    encoder = splits[0].features.shape[1] == len(POOLINGS)
    return EncoderScore(
        name=name,
        probe_accuracy=probe.test_accuracy,
        probe_layer=probe.layer + 1 if encoder else None,
        probe_pooling=POOLINGS[probe.pooling] if encoder else None,
        probe_l2=probe.l2,
        probe_curve=probe.curve,
        knn_accuracy=neighbours.test_accuracy,
        knn_layer=neighbours.layer + 1 if encoder else None,
        knn_pooling=POOLINGS[neighbours.pooling] if encoder else None,
        knn_curve=neighbours.curve,
    )


def _where(layer: int | None, pooling: str | None) -> str:
    return "" if layer is None else f"block {layer}, {pooling}"
