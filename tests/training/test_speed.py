"""Choices that leave the result alone: what is chosen, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastbeit.batch import MimBatch
from fastbeit.recipes import load_recipe
from fastbeit.tokenizer import DvaeConfig
from fastbeit.training import speed
from fastbeit.training.feed import Feed, choose_ahead
from fastbeit.training.memory import FITS, choose_checkpointing, rank_memory

GPU = torch.device("cuda", 0)


def base_with(**changes: Any) -> Any:
    config = load_recipe("beit-base-in1k")
    return replace(config, run=replace(config.run, **changes))


def memory(checkpointing: bool = False, micro_batch: int = 128) -> Any:
    return rank_memory(
        base_with(),
        DvaeConfig(),
        micro_batch,
        world_size=1,
        local_size=1,
        fused_attention=True,
        checkpointing=checkpointing,
    )


def test_checkpointing_where_the_estimate_does_not_fit() -> None:
    plain = memory()
    just = int(plain.peak / FITS) + 1
    assert choose_checkpointing("auto", plain, just)[0] is False
    chosen, reason = choose_checkpointing("auto", plain, just - 2)
    assert chosen and f"{plain.peak / 1e9:.1f} GB of {just / 1e9:.1f} GB" in reason
    assert choose_checkpointing("auto", plain, None)[0] is False
    assert choose_checkpointing("on", plain, 10**15) == (True, "asked for by name")
    assert choose_checkpointing("off", plain, 1) == (False, "asked for by name")
    frugal = memory(checkpointing=True)
    assert frugal.activations < plain.activations / 4
    assert frugal._replace(activations=0) == plain._replace(activations=0)


def test_what_runs_beside_the_step_adds_to_its_memory() -> None:
    plain = memory()
    beside = plain._replace(beside=True)
    assert beside.peak - plain.peak == plain.tokenizer_activations
    config = base_with(precision="fp32", shard="zero3")
    sizes = {"local_size": 1, "fused_attention": True}
    alone = rank_memory(config, DvaeConfig(), 8, world_size=1, **sizes)
    assert alone.gathered_weights == 0  # one device computes with the masters
    assert memory().gathered_weights == memory().master_weights // 2


def test_every_choice_is_told_with_its_reason(world, monkeypatch) -> None:
    settled = speed.settle_speed(base_with(), DvaeConfig(), world, 2)
    assert (settled.checkpointing, settled.graph, settled.ahead) == (False, False, False)
    starts = ("activation checkpointing: off (", "CUDA graph: off (the step runs on the CPU)")
    assert all(note.startswith(start) for note, start in zip(settled.notes, starts, strict=False))
    assert len(settled.notes) == 3
    monkeypatch.setattr(speed.hardware, "memory_bytes", lambda: 12_000_000_000)
    two = replace(world, size=2, local_size=2)  # 6 GB each
    assert speed.device_memory_bytes(two) == 6_000_000_000
    settled = speed.settle_speed(base_with(), DvaeConfig(), two, 128)
    assert settled.checkpointing and "of 6.0 GB without it" in settled.notes[0]
    with pytest.raises(ValueError, match="--cuda-graph on: the step runs on the CPU"):
        speed.settle_speed(base_with(cuda_graph="on"), DvaeConfig(), world, 2)
    with pytest.raises(ValueError, match="--tokenize-ahead on needs a GPU"):
        speed.settle_speed(base_with(tokenize_ahead="on"), DvaeConfig(), world, 2)


def test_tokens_run_ahead_only_when_asked_until_it_is_measured() -> None:
    assert choose_ahead("on", GPU) == (True, "asked for by name")
    assert choose_ahead("off", GPU) == (False, "asked for by name")
    chosen, reason = choose_ahead("auto", GPU)
    assert not chosen and "not measured yet" in reason


class Loader:
    """Endless, and remembers how many it gave."""

    def __init__(self) -> None:
        self.given = 0
        self.closed = False

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> MimBatch:
        self.given += 1
        images = torch.zeros(2, 1, 4, 4)
        index = torch.tensor([2 * self.given, 2 * self.given + 1])
        return MimBatch(images, images, torch.zeros(2, 1, dtype=torch.int32), None, index)

    def close(self) -> None:
        self.closed = True


class Watch:
    """Notes where a rank said it was."""

    def __init__(self) -> None:
        self.said: list[tuple[int, str]] = []

    def at(self, step: int, phase: str) -> None:
        self.said.append((step, phase))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_feed_takes_what_the_run_takes_and_no_more(ahead) -> None:
    loader, watch = Loader(), Watch()
    encode = (lambda batch: batch.index[:, None]) if ahead else None
    feed = Feed(loader, watch, torch.device("cpu"), batches=6, encode=encode)  # type: ignore[arg-type]
    seen = []
    for step in range(3):
        batches = list(feed.take(step, 2))
        seen += [int(batch.index[0]) for batch in batches]
        assert feed.sample_ids == [i for batch in batches for i in batch.index.tolist()]
        for batch in batches:
            assert (batch.targets is not None) == ahead
            assert not ahead or torch.equal(batch.targets[:, 0], batch.index)  # type: ignore[index]
        # Ahead: one batch more than was handed out, but for the last.
        assert loader.given == min(2 * (step + 1) + ahead, 6)
    assert seen == [2, 4, 6, 8, 10, 12]
    assert list(feed.take(3, 2)) == [] and loader.given == 6
    assert watch.said[:3] == [(0, "computing"), (0, "loading"), (0, "computing")]
    assert (2, "computing") in watch.said  # also where the last step's batches are there already
    assert 0.0 < feed.read_waited_s() < 1.0 and feed.read_waited_s() == 0.0
    feed.close()
    assert loader.closed
