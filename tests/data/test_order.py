"""Orders are permutations that look random; steps are the same samples for any number of ranks."""

from collections import Counter
from math import sqrt
from statistics import NormalDist

import numpy as np
import pytest

from fastbeit.data import BatchSchedule, EpochOrder
from fastbeit.data.order import permute
from fastbeit.data.philox import MAX_INDEX

# A correct order fails one of the statistical tests with this probability, for a new seed.
FALSE_ALARM = 1e-6


def chi_square_limit(degrees: int) -> float:
    """Upper quantile by Wilson and Hilferty's cube."""
    spread = 2.0 / (9.0 * degrees)
    return degrees * (1.0 - spread + NormalDist().inv_cdf(1.0 - FALSE_ALARM) * sqrt(spread)) ** 3


@pytest.mark.parametrize("num_samples", [*range(1, 201), 997, 1009, 4096, 4097, 10_007])
def test_every_sample_once_an_epoch(num_samples):
    order = EpochOrder(num_samples, seed=5, epoch=3).indices(0, num_samples)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(num_samples))


def test_pieces_are_parts_of_the_whole():
    order = EpochOrder(1009, seed=1, epoch=2)
    whole = order.indices(0, 1009)
    pieces = [order.indices(start, min(start + 100, 1009)) for start in range(0, 1009, 100)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert order.indices(7, 7).shape == (0,)


def test_large_sources_need_no_memory():
    order = EpochOrder(MAX_INDEX, seed=0, epoch=0).indices(MAX_INDEX - 1000, MAX_INDEX)
    assert len(np.unique(order)) == 1000
    assert order.min() >= 0
    assert order.max() < MAX_INDEX
    # 1000 uniform samples leave each eighth of the range empty with probability 1e-58.
    assert len(np.unique(order // (MAX_INDEX // 8))) == 8


def test_seeds_and_epochs_give_unrelated_orders():
    first = EpochOrder(5000, seed=0, epoch=0).indices(0, 5000)
    for seed, epoch in [(0, 1), (1, 0), (2**32, 0)]:
        other = EpochOrder(5000, seed, epoch).indices(0, 5000)
        assert (other == first).sum() < 20  # about Poisson(1): 20 or more has probability 1e-19
        assert abs(np.corrcoef(first, other)[0, 1]) < 5.0 / sqrt(5000)


@pytest.mark.parametrize(("num_samples", "orders"), [(2, 2), (3, 6), (4, 24), (5, 120), (6, 720)])
def test_all_orders_of_a_few_are_equally_likely(num_samples, orders):
    epochs = np.arange(100 * orders)[:, None]
    drawn = permute(np.arange(num_samples), num_samples, 9, epochs)
    counts = np.array(list(Counter(map(tuple, drawn.tolist())).values()))
    assert len(counts) == orders
    assert ((counts - 100.0) ** 2 / 100.0).sum() < chi_square_limit(orders - 1)


@pytest.mark.parametrize("num_samples", [2, 3, 4, 12, 50])
def test_every_sample_is_as_likely_at_every_place(num_samples):
    trials = 200 * num_samples
    orders = permute(np.arange(num_samples), num_samples, 3, np.arange(trials)[:, None])
    cells = np.stack([np.bincount(column, minlength=num_samples) for column in orders.T])
    statistic = ((cells - 200.0) ** 2 / 200.0).sum()
    assert statistic < chi_square_limit((num_samples - 1) ** 2)


def test_neighbours_in_the_order_are_not_neighbours_in_the_source():
    order = EpochOrder(20_000, seed=0, epoch=0).indices(0, 20_000)
    limit = 5.0 / sqrt(20_000)
    for lag in (1, 2, 141, 142):  # the network's rectangle is 142 x 141
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < limit
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < limit


def test_places_outside_the_source_are_refused():
    with pytest.raises(ValueError, match=r"places must lie in \[0, 10\), got 5 to 10"):
        EpochOrder(10, 0, 0).indices(5, 11)
    with pytest.raises(ValueError, match="num_samples must lie in"):
        EpochOrder(0, 0, 0).indices(0, 0)


@pytest.mark.parametrize(
    ("world_size", "accumulation"), [(1, 1), (2, 1), (1, 4), (4, 2), (3, 2), (24, 1)]
)
def test_a_step_is_the_same_samples_for_any_split(world_size, accumulation):
    schedule = BatchSchedule(num_samples=100, global_batch=24, seed=7)
    for step in range(10):
        parts = [
            schedule.indices(
                step, micro=micro, accumulation=accumulation, rank=rank, world_size=world_size
            )
            for micro in range(accumulation)
            for rank in range(world_size)
        ]
        place = (step % 4) * 24
        expected = EpochOrder(100, 7, step // 4).indices(place, place + 24)
        assert {epoch for epoch, _ in parts} == {step // 4} == {schedule.epoch_of(step)}
        # Not only the same set: read micro by micro and rank by rank, the same order.
        np.testing.assert_array_equal(np.concatenate([index for _, index in parts]), expected)


def test_an_epoch_has_no_sample_twice_and_drops_others_each_time():
    schedule = BatchSchedule(num_samples=100, global_batch=24, seed=0)
    assert schedule.steps_per_epoch == 4
    dropped = []
    for epoch in range(3):
        steps = range(epoch * 4, epoch * 4 + 4)
        index = np.concatenate(
            [schedule.indices(s, micro=0, accumulation=1, rank=0, world_size=1)[1] for s in steps]
        )
        assert len(set(index.tolist())) == 96
        dropped.append(frozenset(range(100)) - set(index.tolist()))
    assert len(set(dropped)) == 3


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="99 samples, fewer than one global batch of 100: lower"):
        BatchSchedule(99, 100, 0)
    with pytest.raises(ValueError, match="global_batch must be at least 1, got 0"):
        BatchSchedule(99, 0, 0)
    schedule = BatchSchedule(99, 32, 0)
    good = {"micro": 0, "accumulation": 1, "rank": 0, "world_size": 1}
    for changes, message in [
        ({"world_size": 3}, "batch of 32 can't be shared equally by 3 ranks x 1 .* multiple of 3"),
        ({"rank": 1}, r"rank must lie in \[0, 1\), got 1"),
        ({"micro": -1}, r"micro must lie in \[0, 1\), got -1"),
        ({"accumulation": 0}, "must be at least 1, got 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            schedule.indices(0, **(good | changes))
    with pytest.raises(ValueError, match="step must be 0 or more, got -1"):
        schedule.indices(-1, **good)
