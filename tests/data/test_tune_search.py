"""Searching the loader's fastest setting, and measuring one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from fastbeit import cli
from fastbeit.batch import MimBatch
from fastbeit.data import tune_search
from fastbeit.data.tune_search import Axes, Search, Setting, counts_up_to, loader_rate

START = Setting("dali", 1, 1, 0.6)
AXES = Axes(START, workers=(1, 2, 4, 8), prefetch=(1, 2, 4), hw_decoder_load=(0.6, 0.7, 0.8, 0.9))
FOREVER = float("inf")


def hill(setting: Setting) -> float:
    """Best at 4 workers, 2 ahead and 0.8: the axes matter one by one and together."""
    assert setting.hw_decoder_load is not None
    far = abs(setting.workers - 4) / 4 + abs(setting.prefetch - 2) / 2
    return 1000 / (1 + far + 3 * abs(setting.hw_decoder_load - 0.8) * (1 + far))


# ---------------------------------------------------------------- the search


def test_the_search_finds_the_top_and_measures_each_setting_once_a_round() -> None:
    asked: list[Setting] = []

    def measure(setting: Setting) -> float:
        asked.append(setting)
        return hill(setting)

    search = Search(measure, rounds=3, ends_s=FOREVER)
    found = search.run(AXES)
    assert found == Setting("dali", 4, 2, 0.8)
    assert not search.cut_short
    assert len(search.rates) < 24 < 48  # of all that there are
    assert all(len(rates) % 3 == 0 for rates in search.rates.values())
    # In turn, the one in hand with the new ones: nothing is measured twice in a row.
    assert asked[:4] == asked[4:8] == [replace(START, workers=w) for w in (1, 2, 4, 8)]
    assert all(one != other for one, other in pairwise(asked))


def test_medians_decide_and_a_hair_more_does_not() -> None:
    noisy = {1: [100.0, 100.0, 100.0], 2: [900.0, 50.0, 60.0], 4: [10.0, 120.0, 130.0]}
    search = Search(lambda s: noisy[s.workers].pop(0), rounds=3, ends_s=FOREVER)
    assert search.fastest([replace(START, workers=w) for w in (1, 2, 4)]).workers == 4
    search.rates = {START: [100.0], replace(START, workers=2): [70.0]}
    assert search.duel(list(search.rates)) == START  # far apart: nothing is left in noisy[1] to ask
    close = Search(lambda s: 100.0 * s.workers, rounds=2, ends_s=FOREVER)
    close.rates = {START: [100.0], replace(START, workers=2): [90.0]}
    assert close.duel([START, replace(START, workers=2)]).workers == 2
    flat = Search(lambda s: 100 + s.workers / 10, rounds=1, ends_s=FOREVER)
    assert flat.run(AXES) == START  # up to 0.8 % more is within the margin


def test_when_the_time_is_over_what_was_measured_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tune_search.time, "monotonic", lambda: now[0])

    def measure(setting: Setting) -> float:
        now[0] += 1
        return hill(setting)

    search = Search(measure, rounds=2, ends_s=5.0)
    assert search.run(AXES) == replace(START, workers=4)  # after four values, and one once more
    assert search.cut_short and sum(map(len, search.rates.values())) == 5
    late = Search(measure, rounds=2, ends_s=-1.0)  # the start is always measured
    assert late.run(AXES) == START and late.rates == {START: [hill(START)]}
    alone = Search(measure, rounds=2, ends_s=FOREVER)  # nothing to try but the start
    assert alone.run(Axes(START, (1,), (1,))) == START and len(alone.rates[START]) == 2


def test_a_slow_loader_leaves_the_others_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tune_search.time, "monotonic", lambda: now[0])

    def measure(setting: Setting) -> float:
        now[0] += 100
        return 5.0 if setting.loader == "dali" else 80.0

    search = Search(measure, rounds=2, ends_s=50.0)
    other = replace(START, loader="reference", hw_decoder_load=None)
    ends = [search.run(AXES), search.run(Axes(other, (1, 2), (1, 2)))]
    assert search.rates == {START: [5.0], other: [80.0]} and search.cut_short
    assert search.duel(ends) == other


def test_a_search_is_not_ended_by_the_one_before_it() -> None:
    search = Search(hill, rounds=1, ends_s=FOREVER, cut_short=True)
    assert search.run(AXES) == replace(START, workers=4, prefetch=2, hw_decoder_load=0.8)
    assert search.cut_short  # still told


def test_counts_and_flags() -> None:
    assert [counts_up_to(most) for most in (0, 1, 2, 6, 16)] == [
        [],
        [1],
        [1, 2],
        [1, 2, 4, 6],
        [1, 2, 4, 8, 16],
    ]
    words = Setting("dali", 8, 4, 0.75).flags().split()
    config = cli.parse(["beit-base-in1k", "--data", "demo", *words]).config.data
    assert (config.loader, config.workers, config.prefetch) == ("dali", 8, 4)
    assert config.hw_decoder_load == 0.75
    assert Setting("reference", 0, 2).flags() == "--loader reference --workers 0 --prefetch 2"


# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize(
    ("ready", "interval_s", "setting", "seconds", "taken"),
    [
        # Two workers with two each, two in the pipeline, one: dropped. Then 20 in ten seconds.
        (7, 0.5, Setting("dali", 2, 2), 10.0, 7 + 20),
        # Ten could be ready; after one that was waited for no more are dropped. Three at least.
        (2, 3.0, Setting("dali", 1, 4), 2.0, 3 + 3),
        # Two of each worker at least.
        (6, 3.0, Setting("reference", 4, 1), 2.0, 6 + 8),
    ],
)
def test_what_was_ready_before_the_clock_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
    ready: int,
    interval_s: float,
    setting: Setting,
    seconds: float,
    taken: int,
) -> None:
    """A loader that gives ``ready`` batches of 8 at once, and then one every ``interval_s``."""
    now = [0.0]
    monkeypatch.setattr(tune_search.time, "perf_counter", lambda: now[0])

    class Fake:
        given = 0
        closed = False

        def __next__(self) -> MimBatch:
            self.given += 1
            now[0] += interval_s if self.given > ready else 0.0
            views = torch.zeros(8, 1, 2, 2)
            return MimBatch(views, views, torch.zeros(8, 1), None, torch.arange(8))

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *error: object) -> None:
            self.closed = True

    fake: Any = Fake()
    assert loader_rate(lambda _: fake, setting, seconds) == pytest.approx(8 / interval_s)
    assert fake.closed and fake.given == taken
