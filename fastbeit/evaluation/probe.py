"""Linear probe: multinomial logistic regression on frozen features, chosen on a validation split.

For every block and pooling the features are standardised with the training split's mean and
deviation, and ``mean cross-entropy + l2/2 * ||W||^2`` is minimised by full-batch L-BFGS from zero:
convex, so the result needs no learning rate, no seed and no augmentation, unlike the SGD probes of
the literature (BEiT's trains 50 to 100 epochs: https://arxiv.org/abs/2106.08254, table 8). Block,
pooling and ``l2`` are those with the best validation accuracy; the test split is read once, at the
end. Shapes: L blocks, P poolings, N samples, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Strongest first: each fit starts from its stronger neighbour's weights.
L2_STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)
MAX_ITERATIONS = 40


class Split(NamedTuple):
    """Features ``[L, P, N, D]`` float32 and labels ``[N]`` int64 of one split."""

    features: np.ndarray
    labels: np.ndarray


class ProbeResult(NamedTuple):
    """Accuracies are shares, 0 to 1.

    Attributes:
        test_accuracy: of the chosen probe on the test split.
        validation_accuracy: of the chosen probe on the split that chose it (biased upwards).
        layer: chosen block, counted from 0.
        pooling: chosen pooling, counted from 0.
        l2: chosen strength (0 for kNN, which has none).
        curve: ``[L][P]`` validation accuracy at each block's and pooling's best strength.
    """

    test_accuracy: float
    validation_accuracy: float
    layer: int
    pooling: int
    l2: float
    curve: list[list[float]]


def linear_probe(
    train: Split,
    validation: Split,
    test: Split,
    *,
    l2_strengths: Sequence[float] = L2_STRENGTHS,
    max_iterations: int = MAX_ITERATIONS,
) -> ProbeResult:
    """Fits on ``train``, chooses on ``validation``, reports on ``test``.

    Ties go to the earlier block, pooling and the stronger regularisation.

    Raises:
        ValueError: splits that disagree in shape, are empty, or have labels unseen in training.
    """
    check_splits(train, validation, test)
    classes = int(train.labels.max()) + 1
    labels, wanted = torch.from_numpy(train.labels), torch.from_numpy(validation.labels)
    best: tuple[float, int, int, float, Tensor] | None = None
    curve: list[list[float]] = []
    for layer in range(train.features.shape[0]):
        curve.append([])
        for pooling in range(train.features.shape[1]):
            fit_ND, choose_ND = _standardised(train, validation, layer, pooling)
            top = 0.0
            weight = torch.zeros(classes, fit_ND.shape[1])
            for l2 in sorted(l2_strengths, reverse=True):
                weight = fit_logistic(
                    fit_ND, labels, l2=l2, start=weight, max_iterations=max_iterations
                )
                accuracy = _accuracy(choose_ND, wanted, weight)
                top = max(top, accuracy)
                if best is None or accuracy > best[0]:
                    best = (accuracy, layer, pooling, l2, weight)
            curve[-1].append(top)
    assert best is not None
    accuracy, layer, pooling, l2, weight = best
    _, test_ND = _standardised(train, test, layer, pooling)
    test_accuracy = _accuracy(test_ND, torch.from_numpy(test.labels), weight)
    return ProbeResult(test_accuracy, accuracy, layer, pooling, l2, curve)


def fit_logistic(
    x_ND: Tensor,
    labels_N: Tensor,
    *,
    l2: float,
    start: Tensor,
    max_iterations: int = MAX_ITERATIONS,
) -> Tensor:
    """Weights ``[K, D]`` of the regularised multinomial logistic regression, from ``start``.

    The last column of ``x_ND`` is the constant 1 and its weight, the bias, is not regularised.
    """
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=max_iterations,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x_ND @ weight.T, labels_N)
        loss = loss + 0.5 * l2 * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    with torch.inference_mode(False), torch.enable_grad():
        optimizer.step(closure)
    return weight.detach()


def check_splits(train: Split, validation: Split, test: Split) -> None:
    """Refuses splits that can't be compared."""
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        layers, poolings, samples, width = split.features.shape
        if samples == 0 or samples != len(split.labels):
            raise ValueError(
                f"the {name} split has {samples} feature rows and {len(split.labels)} labels: "
                "expected the same number, at least 1"
            )
        reference = train.features.shape
        if (layers, poolings, width) != (reference[0], reference[1], reference[3]):
            raise ValueError(
                f"the {name} split has features of shape {list(split.features.shape)}, the train "
                f"split {list(reference)}: extract both with one model"
            )
        unseen = sorted(set(split.labels.tolist()) - set(train.labels.tolist()))
        if unseen:
            raise ValueError(
                f"the {name} split has labels {unseen[:10]} that the train split lacks: give the "
                "splits the same classes, or raise the training limit"
            )


def _standardised(fit: Split, apply: Split, layer: int, pooling: int) -> tuple[Tensor, Tensor]:
    """Both splits ``[N, D + 1]``, scaled by the first's statistics, with a column of ones."""
    fit_ND = torch.from_numpy(fit.features[layer, pooling])
    mean_D, std_D = fit_ND.mean(0), fit_ND.std(0, correction=0)
    # A feature that is constant in training (a pixel in the corner) carries nothing: scaling its
    # rounding noise up to 1 would.
    scale_D = torch.where(std_D > 1e-6, 1 / std_D, 0.0)

    def scaled(x_ND: Tensor) -> Tensor:
        return torch.cat([(x_ND - mean_D) * scale_D, torch.ones(len(x_ND), 1)], dim=1)

    return scaled(fit_ND), scaled(torch.from_numpy(apply.features[layer, pooling]))


def _accuracy(x_ND: Tensor, labels_N: Tensor, weight_KD: Tensor) -> float:
    return (x_ND @ weight_KD.T).argmax(1).eq(labels_N).double().mean().item()
