"""The chance lines against sums written out by hand, and over two processes."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastbeit.training.chance import PositionalStats


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def test_matches_a_count_by_hand():
    # Position 0 always holds code 2; position 1 holds codes 0 and 3 equally; nothing at 2.
    targets = torch.tensor([[2, 0], [2, 3], [2, -1]])
    positions = torch.tensor([[0, 1], [0, 1], [0, -1]], dtype=torch.int32)
    stats = PositionalStats(3, 4)
    stats.update(targets, positions)
    lines = stats.measure()
    assert lines.slots == 5
    assert lines.loss_nats == pytest.approx(0.4 * math.log(2))
    assert lines.accuracy == pytest.approx((3 + 1) / 5)
    entropy = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))
    assert lines.entropy_nats == pytest.approx(entropy)
    assert lines.codes_used == 3
    assert lines.perplexity == pytest.approx(math.exp(entropy), rel=1e-6)
    assert stats.tensor.tolist() == [[0, 0, 3, 0], [1, 0, 0, 1], [0, 0, 0, 0]]


def test_matches_numpy_on_random_tokens_in_many_updates():
    rng = np.random.default_rng(0)
    patches, codes = 9, 17
    counts = np.zeros((patches, codes), dtype=np.int64)
    stats = PositionalStats(patches, codes)
    for _ in range(5):
        positions = np.sort(rng.integers(-1, patches, size=(32, 6)), axis=1)
        targets = np.minimum(rng.geometric(0.2, size=(32, 6)) - 1, codes - 1)
        stats.update(torch.tensor(targets), torch.tensor(positions, dtype=torch.int32))
        kept = positions >= 0
        np.add.at(counts, (positions[kept], targets[kept]), 1)
    lines = stats.measure()
    slots = counts.sum()
    assert np.array_equal(stats.tensor.numpy(), counts)
    assert lines.loss_nats == pytest.approx(
        sum(row.sum() / slots * _entropy(row) for row in counts), rel=1e-12
    )
    assert lines.accuracy == pytest.approx(counts.max(1).sum() / slots, rel=1e-12)
    assert lines.entropy_nats == pytest.approx(_entropy(counts.sum(0)), rel=1e-12)
    assert lines.loss_nats < lines.entropy_nats


def test_is_a_lower_bound_on_every_position_only_predictor_of_the_same_slots():
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(0, 5, (64, 8), generator=generator, dtype=torch.int32)
    targets = torch.randint(0, 6, (64, 8), generator=generator)
    stats = PositionalStats(5, 6)
    stats.update(targets, positions)
    lines = stats.measure()
    logits = torch.zeros(5, 6, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")
    rows, labels = positions.long().flatten(), targets.flatten()

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits[rows], labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        best = torch.nn.functional.cross_entropy(logits[rows], labels).item()
    assert best == pytest.approx(lines.loss_nats, abs=1e-4)
    assert best >= lines.loss_nats - 1e-6


def test_empty_statistics_are_nan_not_an_error():
    lines = PositionalStats(3, 4).measure()
    assert math.isnan(lines.loss_nats) and math.isnan(lines.accuracy)
    assert (lines.codes_used, lines.slots) == (0, 0)


def test_checkpoint_round_trip_goes_on_as_if_never_stopped():
    generator = torch.Generator().manual_seed(2)
    batches = [
        (
            torch.randint(0, 7, (4, 3), generator=generator),
            torch.randint(0, 5, (4, 3), generator=generator, dtype=torch.int32),
        )
        for _ in range(4)
    ]
    straight, first, second = (PositionalStats(5, 7) for _ in range(3))
    for batch in batches:
        straight.update(*batch)
    for batch in batches[:2]:
        first.update(*batch)
    second.load(first.tensor.clone())
    for batch in batches[2:]:
        second.update(*batch)
    assert torch.equal(straight.tensor, second.tensor)
    assert straight.measure() == second.measure()


def test_impossible_tokens_are_reported_at_log_time():
    stats = PositionalStats(3, 4)
    stats.update(torch.tensor([[1, 4]]), torch.tensor([[0, 1]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"1 target tokens lay outside .* 3 positions x 4 codes"):
        stats.measure()


def test_wrong_shapes_are_refused():
    stats = PositionalStats(3, 4)
    with pytest.raises(ValueError, match=r"\[1, 2\] and \[1, 3\]"):
        stats.update(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="another patch grid or codebook"):
        stats.load(torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be positive"):
        PositionalStats(0, 4)


def _batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    targets = torch.randint(0, 7, (4, 3), generator=generator)
    return targets, torch.randint(0, 5, (4, 3), generator=generator, dtype=torch.int32)


def _two_ranks(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    stats = PositionalStats(5, 7)
    stats.update(*_batch(rank))
    try:
        _ = stats.tensor
        message = ""
    except RuntimeError as error:
        message = str(error)
    stats.measure()
    stats.fold()  # nothing new: must not count anything twice
    resumed = PositionalStats(5, 7)
    resumed.load(stats.tensor.clone())
    resumed.fold()
    torch.save(
        {"counts": stats.tensor, "resumed": resumed.tensor, "message": message},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_ranks_hold_the_sum_and_it_survives_a_reload(tmp_path: Path):
    mp.spawn(_two_ranks, args=(str(tmp_path),), nprocs=2)
    alone = PositionalStats(5, 7)
    for rank in range(2):
        alone.update(*_batch(rank))
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(result["counts"], alone.tensor)
        assert torch.equal(result["resumed"], alone.tensor)
        assert "call fold()" in result["message"]
