"""Tokens ahead of the step: plain calls on a CPU, and on a GPU's streams who waits for whom.

The streams are stand-ins that keep, like vector clocks, what each of them is sure has happened
before its next operation. That is all that CUDA promises, so what they accept is ordered, and what
they know too much of would not overlap.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fastbeit.batch import MimBatch
from fastbeit.tokenizer import load_tokenizer
from fastbeit.tokenizer.tokenize_ahead import TokenizeAhead


def batch_of(number: int, images: int = 2) -> MimBatch:
    generator = torch.Generator().manual_seed(number)
    return MimBatch(
        images=torch.rand(images, 3, 28, 28, generator=generator),
        token_images=torch.rand(images, 3, 28, 28, generator=generator),
        positions=torch.tensor([[0, 3, -1]] * images, dtype=torch.int32),
        drop_scale=None,
        index=torch.full((images,), number),
    )


def test_on_a_cpu_it_is_the_plain_calls() -> None:
    tokenizer = load_tokenizer("demo")
    encode = lambda batch: tokenizer.encode(batch.token_images, batch.positions)  # noqa: E731
    batches = [batch_of(number) for number in range(3)]
    for graph in (False, True):
        handed = list(TokenizeAhead(batches, encode, "cpu", graph=graph))
        assert [replace(batch, targets=None) for batch in handed] == batches
        for batch in handed:
            assert torch.equal(batch.targets, encode(batch))


def test_empty_and_single() -> None:
    assert list(TokenizeAhead([], lambda batch: batch.index, "cpu")) == []
    (batch,) = TokenizeAhead([batch_of(7)], lambda batch: batch.index, "cpu")
    assert batch.targets.tolist() == [7, 7]


def test_one_batch_ahead_and_no_more() -> None:
    taken = []

    def loader():
        for number in range(5):
            taken.append(number)
            yield batch_of(number)

    for step, batch in enumerate(TokenizeAhead(loader(), lambda batch: batch.index, "cpu")):
        assert batch.index[0] == step
        assert taken == list(range(min(step + 2, 5)))


def test_an_error_of_the_loader_comes_after_the_batches_before_it() -> None:
    def loader():
        yield batch_of(0)
        yield batch_of(1)
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for batch in TokenizeAhead(loader(), lambda batch: batch.index, "cpu"):
            seen.append(int(batch.index[0]))
    assert seen == [0, 1]


class Stream:
    """Knows ``happened``: the operations that are over before its next one begins."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.happened: set[str] = set()

    def wait_stream(self, other: Stream) -> None:
        self.happened |= other.happened

    def wait_event(self, event: Event) -> None:
        assert event.happened is not None, "waits for an event that nobody has recorded"
        self.happened |= event.happened


class Event:
    happened: set[str] | None = None

    def record(self, stream: Stream) -> None:
        self.happened = set(stream.happened)


class World:
    """``torch.cuda`` as far as streams go; ``current`` runs what is done."""

    def __init__(self, monkeypatch) -> None:
        self.main = self.current = Stream(self)
        self.side: Stream | None = None
        self.kept: list[tuple[int, Stream]] = []
        self.queued: list[str] = []
        monkeypatch.setattr(torch.cuda, "Stream", self._new_stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._switch)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda t, stream: self.kept.append((id(t), stream))
        )

    def _new_stream(self, device=None) -> Stream:
        assert self.side is None, "one side stream is enough"
        self.side = Stream(self)
        return self.side

    @contextmanager
    def _switch(self, stream: Stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def do(self, name: str, *needs: str) -> None:
        """Queue an operation on the current stream; what it needs must be over by then."""
        missing = set(needs) - self.current.happened
        assert not missing, f"{name} runs before {missing}"
        self.current.happened.add(name)
        self.queued.append(name)


def test_streams_wait_for_what_they_need_and_for_nothing_else(monkeypatch) -> None:
    world = World(monkeypatch)
    tokens: dict[int, torch.Tensor] = {}

    def loader():
        for number in range(4):
            world.do(f"load {number}")
            yield batch_of(number)

    def encode(batch: MimBatch) -> torch.Tensor:
        number = int(batch.index[0])
        assert world.current is world.side
        world.do(f"tokens {number}", f"load {number}")
        # It overlaps with the step before: of that it mustn't wait for anything.
        assert f"step {number - 1}" not in world.current.happened
        tokens[number] = torch.zeros(1)
        return tokens[number]

    steps = []
    for batch in TokenizeAhead(loader(), encode, "cuda"):
        number, targets = int(batch.index[0]), batch.targets
        assert world.current is world.main and world.side is not None
        assert targets is tokens[number]
        # The next tokens are in the queue before this step, and this step doesn't wait for them.
        assert (f"tokens {number + 1}" in world.queued) == (number < 3)
        world.do(f"step {number}", f"load {number}", f"tokens {number}")
        assert f"tokens {number + 1}" not in world.main.happened
        # Memory that the side stream reads, and that the main stream reads of its.
        assert {(id(batch.token_images), world.side), (id(batch.positions), world.side)} <= set(
            world.kept
        )
        assert (id(targets), world.main) in world.kept
        steps.append(number)
    assert steps == [0, 1, 2, 3]


class Graph:
    """Runs again what was done while it was captured."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.again = lambda: None

    def replay(self) -> None:
        self.log.append("replay")
        self.again()


def test_a_graph_is_captured_once_and_replayed_on_copies(monkeypatch) -> None:
    world, log = World(monkeypatch), []
    static: list[MimBatch] = []
    results: list[torch.Tensor] = []

    def value(batch: MimBatch) -> torch.Tensor:
        return (batch.token_images.sum((1, 2, 3)) * 1000).long()[:, None] + batch.positions

    def encode(batch: MimBatch) -> torch.Tensor:
        assert world.current is world.side
        log.append("encode")
        static.append(batch)
        results.append(value(batch))
        return results[-1]

    @contextmanager
    def capture(graph, *, stream, capture_error_mode):
        assert stream is world.side and capture_error_mode == "thread_local"
        log.append("capture")
        yield
        inputs, tokens = static[-1], results[-1]
        graph.again = lambda: tokens.copy_(value(inputs))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(log))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    batches = [batch_of(0), batch_of(1), batch_of(2), batch_of(3, images=1)]
    handed = list(TokenizeAhead(batches, encode, "cuda", graph=True))
    # All are there at the end: no replay overwrote what an earlier one had given out.
    for batch in handed:
        assert torch.equal(batch.targets, value(batch))
    assert log == ["encode", "encode", "capture", "encode", "replay", "replay", "replay", "encode"]
    assert static[0].token_images is not batches[0].token_images
