"""k nearest neighbours on frozen features, as DINO weighs them: https://arxiv.org/abs/2104.14294.

The k training features of the highest cosine similarity s vote for their class with weight
``exp(s / 0.07)``. No training and nothing to tune; block and pooling are chosen on the validation
split. Shapes: L blocks, P poolings, N samples, D features, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbeit.evaluation.probe import ProbeResult, Split, check_splits

NEIGHBOURS = 20
TEMPERATURE = 0.07


def knn(
    train: Split,
    validation: Split,
    test: Split,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> ProbeResult:
    """Chooses block and pooling on ``validation``, reports on ``test``; ``l2`` is 0.

    Raises:
        ValueError: as :func:`fastbeit.evaluation.probe.linear_probe`; fewer training samples than
            ``neighbours``.
    """
    check_splits(train, validation, test)
    if len(train.labels) < neighbours:
        raise ValueError(
            f"{neighbours} neighbours need at least as many training samples, got "
            f"{len(train.labels)}"
        )

    def accuracy(split: Split, layer: int, pooling: int) -> float:
        predicted = predict(
            torch.from_numpy(train.features[layer, pooling]),
            torch.from_numpy(train.labels),
            torch.from_numpy(split.features[layer, pooling]),
            neighbours=neighbours,
            temperature=temperature,
        )
        return predicted.eq(torch.from_numpy(split.labels)).double().mean().item()

    layers, poolings = train.features.shape[:2]
    curve = [[accuracy(validation, i, p) for p in range(poolings)] for i in range(layers)]
    best, layer, pooling = max(
        ((curve[i][p], i, p) for i in range(layers) for p in range(poolings)),
        key=lambda item: item[0],
    )
    return ProbeResult(accuracy(test, layer, pooling), best, layer, pooling, 0.0, curve)


def predict(
    train_ND: Tensor,
    labels_N: Tensor,
    queries_QD: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    chunk: int = 1000,
) -> Tensor:
    """Classes ``[Q]`` int64 of the queries."""
    classes = int(labels_N.max()) + 1
    train_ND = torch.nn.functional.normalize(train_ND.float(), dim=1)
    predictions = []
    for queries in queries_QD.float().split(chunk):
        similarity = torch.nn.functional.normalize(queries, dim=1) @ train_ND.T
        top, index = similarity.topk(neighbours, dim=1)
        votes = torch.zeros(len(queries), classes)
        # Minus 1 (the largest similarity) keeps the exponentials below 1; shares are unchanged.
        votes.scatter_add_(1, labels_N[index], ((top - 1) / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)
