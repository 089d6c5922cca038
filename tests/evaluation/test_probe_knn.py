"""Probe and kNN on features whose best classifier is known."""

import math

import numpy as np
import pytest
import torch

from fastbeit.evaluation.knn import knn, predict
from fastbeit.evaluation.probe import Split, condition, fit_logistic, linear_probe


def _blobs(samples: int, seed: int, *, spread: float, classes: int = 4) -> Split:
    """Two blocks, two poolings; only block 1, pooling 0 knows the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(samples, dtype=np.int64) % classes
    features = rng.normal(size=(2, 2, samples, 6)).astype(np.float32)
    centres = 4 * np.eye(classes, 6, dtype=np.float32)
    features[1, 0] = centres[labels] + spread * features[1, 0]
    # Scales and offsets that a classifier without standardisation would trip over.
    features[..., 1] *= 1e-3
    features[..., 2] += 1e3 * (features[..., 2] > 1e9)
    return Split(features, labels)


def test_probe_finds_the_block_and_pooling_that_know_the_class():
    splits = [_blobs(n, seed, spread=0.5) for seed, n in enumerate((400, 200, 300))]
    result = linear_probe(*splits)
    assert (result.layer, result.pooling) == (1, 0)
    assert result.test_accuracy > 0.99
    assert result.curve[1][0] == result.validation_accuracy > 0.99
    assert all(result.curve[i][p] < 0.5 for i, p in ((0, 0), (0, 1), (1, 1)))
    assert linear_probe(*splits) == result  # no randomness


def test_probe_result_is_the_test_splits_and_the_choice_the_validations():
    train, test = _blobs(400, 0, spread=0.5), _blobs(300, 2, spread=0.5)
    # Here validation says block 0, pooling 1: the probe must believe it, and do badly in the test.
    features = _blobs(200, 1, spread=0.5)
    swapped = features.features.copy()
    swapped[1, 0] = np.random.default_rng(5).normal(size=swapped[1, 0].shape)
    train_features = train.features.copy()
    train_features[0, 1] = train_features[1, 0]
    swapped[0, 1] = features.features[1, 0]
    result = linear_probe(
        Split(train_features, train.labels), Split(swapped, features.labels), test
    )
    assert (result.layer, result.pooling) == (0, 1)
    assert result.validation_accuracy > 0.99 and result.test_accuracy < 0.5


def test_logistic_fit_reaches_the_optimum_of_the_stated_objective():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    labels = (x[:, 0] + 0.5 * torch.randn(200, generator=generator, dtype=torch.float64) > 0).long()
    x[:, 1] = x[:, 0] + 1e-3 * x[:, 1]  # nearly collinear, as an untrained encoder's features
    x = x - x.mean(0)
    data = condition(x)
    start = torch.zeros(2, 6, dtype=torch.float64)
    rotated = fit_logistic(data, labels, l2=0.01, start=start, max_iterations=60)
    # Back in the features' own coordinates the gradient of the stated objective must vanish.
    weight = (rotated[:, :-1] @ data.axes_DD.T).requires_grad_()
    bias = rotated[:, -1].clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels)
    (loss + 0.005 * weight.square().sum()).backward()
    assert weight.grad is not None and weight.grad.abs().max() < 2e-5
    assert bias.grad is not None and bias.grad.abs().max() < 2e-5
    # Stronger regularisation, smaller weights; the bias stays free.
    strong = fit_logistic(data, labels, l2=10.0, start=start, max_iterations=60)
    assert strong[:, :-1].norm() < 0.1 * weight.norm()
    shares = torch.softmax(strong[:, -1], 0)
    torch.testing.assert_close(shares[1], labels.double().mean(), atol=5e-3, rtol=0)


def test_a_feature_that_never_varies_in_training_is_ignored():
    train, validation, test = (_blobs(n, s, spread=0.5) for s, n in enumerate((200, 100, 100)))
    for split in (train, validation, test):
        split.features[..., 5] = 0.0
    test.features[..., 5] = 1e6
    assert linear_probe(train, validation, test).test_accuracy > 0.97


def test_knn_votes_with_exponential_cosine_weights():
    def unit(degrees: float) -> list[float]:
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]

    # One neighbour of class 1 at 5 degrees against two of class 0 at d; lengths don't count.
    def vote(degrees: float, temperature: float) -> int:
        train = torch.tensor([unit(5), unit(degrees), unit(-degrees), unit(180), unit(179)])
        train = train * torch.tensor([[9.0], [1.0], [0.1], [5.0], [5.0]])
        labels = torch.tensor([1, 0, 0, 2, 2])
        query = torch.tensor([unit(0)]) * 3
        return int(predict(train, labels, query, neighbours=3, temperature=temperature)[0])

    # Equal votes where exp(cos 5 / t) = 2 exp(cos d / t): d = 18.62 degrees at t = 0.07.
    assert vote(18.5, 0.07) == 0
    assert vote(18.75, 0.07) == 1
    assert vote(18.75, 1.0) == 0


def test_knn_chooses_on_validation_and_chunks_agree():
    splits = [_blobs(n, seed, spread=0.5) for seed, n in enumerate((300, 200, 250))]
    for split in splits:
        split.features[..., 1] *= 1e3  # cosines see scales: undo the small one
    result = knn(*splits)
    assert (result.layer, result.pooling, result.l2) == (1, 0, 0.0)
    assert result.test_accuracy > 0.95
    arguments = [torch.from_numpy(a) for a in (splits[0].features[1, 0], splits[0].labels)]
    queries = torch.from_numpy(splits[2].features[1, 0])
    assert torch.equal(predict(*arguments, queries), predict(*arguments, queries, chunk=7))


def test_splits_that_do_not_fit_are_refused():
    train, other = _blobs(40, 0, spread=1.0), _blobs(40, 1, spread=1.0)
    with pytest.raises(ValueError, match=r"test split has labels \[9\]"):
        linear_probe(train, other, Split(other.features, np.full(40, 9)))
    with pytest.raises(ValueError, match="one model"):
        linear_probe(train, Split(other.features[:1], other.labels), other)
    with pytest.raises(ValueError, match="40 feature rows and 39 labels"):
        linear_probe(train, Split(other.features, other.labels[1:]), other)
    with pytest.raises(ValueError, match="got 8"):
        knn(Split(train.features[:, :, :8], train.labels[:8]), other, other)
