"""A step replayed as CUDA graphs against the eager one, without a GPU.

The stand-in for a graph records every operation of a capture, undoes what it did, as a capture does
nothing, and replays by running the operations again on the same tensors: whatever a step kept in a
Python number, or wherever it read something that isn't copied in, stays as it was at the capture.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from fastbeit.batch import MimBatch
from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.training import distributed
from fastbeit.training.config import OptimizerConfig
from fastbeit.training.graph import WARM_UPS, GraphedStep, choose_graph
from fastbeit.training.optimizer import build_optimizer, make_capturable, set_lr
from fastbeit.training.step import TrainStep

CONFIG = BeitConfig(
    image_size=32, patch_size=8, width=32, depth=3, heads=2, vocab_size=24, layer_scale=0.3
)
STEPS = WARM_UPS + 4


def memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()


class Graph(TorchDispatchMode):
    """Also the context in which it is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_flatten(value)[0]:
                    self.before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        out = func(*args, **kwargs)
        self.calls.append(tree_map_only(torch.Tensor, memory, (func, args, kwargs, out)))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            if any(result.alias_info is not None for result in func._schema.returns):
                continue  # a view, or written in place
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    made: list[Graph] = []

    class Stream:
        def __init__(self, device=None) -> None: ...

        def wait_stream(self, other) -> None: ...

    def new() -> Graph:
        made.append(Graph())
        return made[-1]

    @contextmanager
    def capture(graph, *, pool, stream, capture_error_mode):
        assert pool == "pool" and capture_error_mode == "thread_local"
        with graph:
            yield
        with torch.no_grad():
            for tensor, value in graph.before.values():
                tensor.copy_(value)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return made


def batch_of(number: int, dtype: torch.dtype) -> MimBatch:
    generator = torch.Generator().manual_seed(number)
    positions = torch.tensor([[0, 5, 9], [2, 3, -1]], dtype=torch.int32)
    if number % 2:
        positions = positions.flip(0)
    drop = torch.randint(0, 2, (2, 2 * CONFIG.depth), generator=generator) / 0.5
    return MimBatch(
        images=torch.randn(2, 3, 32, 32, generator=generator).to(dtype),
        token_images=torch.rand(2, 3, 32, 32, generator=generator),
        positions=positions,
        drop_scale=drop,
        index=torch.tensor([number, number]),
    )


def tokens_of(batch: MimBatch) -> torch.Tensor:
    return (batch.token_images.sum((1, 2, 3)).long() % 20)[:, None] + batch.positions % 4


def train(world, precision: str, accumulation: int, *, graphed: bool, poison: int = -1) -> Any:
    model = BeitForMim(CONFIG, seed=0)
    placement = distributed.place_model(model, world, mode="none", precision=precision)
    optimizer = build_optimizer(model, OptimizerConfig())
    make_capturable(optimizer, world.device)
    for group in optimizer.param_groups:
        group["capturable"] = False  # on the CPU AdamW refuses it; the tensors are what matters
    seen: list[int] = []
    step = TrainStep(
        model,
        optimizer,
        tokens_of,
        world,
        slots=6 * accumulation,
        clip_norm=0.5,
        weights=placement.weights,
        observe=lambda targets, positions: seen.append(int(targets.sum())),
    )
    runner = GraphedStep(step) if graphed else step
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    results = []
    for number in range(STEPS):
        set_lr(optimizer, 1e-2 / (number + 1))
        batches = [batch_of(number * accumulation + k, dtype) for k in range(accumulation)]
        if number == poison:
            batches[0] = replace(batches[0], images=batches[0].images * float("nan"))
        results.append(runner.run(batches, accumulation))
    return results, model, optimizer, seen


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replays_train_as_the_eager_step_does(world, graphs, precision, accumulation) -> None:
    poison = WARM_UPS + 2
    expected = train(world, precision, accumulation, graphed=False, poison=poison)
    assert not graphs
    found = train(world, precision, accumulation, graphed=True, poison=poison)
    assert [graph.replays for graph in graphs] == (
        [STEPS - WARM_UPS] * 2
        if accumulation == 1
        else [STEPS - WARM_UPS, (STEPS - WARM_UPS) * (accumulation - 1), STEPS - WARM_UPS]
    )
    for step, (ours, eager) in enumerate(zip(found[0], expected[0], strict=True)):
        assert torch.equal(torch.stack(ours).nan_to_num(), torch.stack(eager).nan_to_num()), step
        assert ours.skipped == (step == poison)
    before = BeitForMim(CONFIG, seed=0).state_dict()
    for name, value in expected[1].state_dict().items():
        assert torch.equal(found[1].state_dict()[name], value), name
        assert not torch.equal(value, before[name]) or name.endswith("qkv.bias"), name
    for ours, eager in zip(found[2].state.values(), expected[2].state.values(), strict=True):
        assert all(torch.equal(ours[key], eager[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert found[3] == expected[3]  # every micro-batch's tokens were counted once


def test_what_differs_from_the_capture_is_refused(world, graphs) -> None:
    _, model, optimizer, _ = train(world, "fp32", 1, graphed=True)
    step = TrainStep(model, optimizer, tokens_of, world, slots=6, clip_norm=0.5)
    runner = GraphedStep(step)
    for number in range(WARM_UPS + 1):
        runner.run([batch_of(number, torch.float32)], 1)
    batch = batch_of(0, torch.float32)
    with pytest.raises(ValueError, match=r"images was torch.float32 \[2, 3, 32, 32\], is torch.fl"):
        runner.run([replace(batch, images=batch.images[:1])], 1)
    with pytest.raises(ValueError, match=r"drop_scale was torch.float32 .*, is none"):
        runner.run([replace(batch, drop_scale=None)], 1)


def test_a_host_sync_in_the_step_is_told_with_advice(world, graphs) -> None:
    model = BeitForMim(CONFIG, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig())
    step = TrainStep(model, optimizer, tokens_of, world, slots=6, clip_norm=0.5)
    runner = GraphedStep(step)

    def read(module, inputs) -> None:
        float(inputs[0].detach().sum())

    model.blocks[0].register_forward_pre_hook(read)
    with pytest.raises(RuntimeError, match="--cuda-graph off runs it without"):
        for number in range(WARM_UPS + 1):
            runner.run([batch_of(number, torch.float32)], 1)


def test_too_little_memory_is_told_as_such(world, graphs, monkeypatch) -> None:
    model = BeitForMim(CONFIG, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig())
    step = TrainStep(model, optimizer, tokens_of, world, slots=6, clip_norm=0.5)
    runner = GraphedStep(step)
    for number in range(WARM_UPS):
        runner.run([batch_of(number, torch.float32)], 1)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "backward", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        runner.run([batch_of(0, torch.float32)], 1)


def test_who_gets_graphs_and_why(world) -> None:
    on_gpu = replace(world, device=torch.device("cuda", 0))
    assert choose_graph("auto", world, "adamw") == (False, "the step runs on the CPU")
    assert choose_graph("on", on_gpu, "adamw") == (True, "asked for by name")
    chosen, reason = choose_graph("auto", on_gpu, "adamw")
    assert chosen and "measured faster" in reason
    chosen, reason = choose_graph("auto", replace(on_gpu, size=2), "adamw")
    assert not chosen and "2 ranks" in reason
    with pytest.raises(ValueError, match="2 ranks"):
        choose_graph("on", replace(on_gpu, size=2), "adamw")
    with pytest.raises(ValueError, match="apex reads back"):
        choose_graph("on", on_gpu, "apex")
    with pytest.raises(ValueError, match="runs on the CPU; use --cuda-graph auto"):
        choose_graph("on", world, "adamw")
