"""Compiling: when, why, and that checkpoint, compile, shard, in this order, change no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from fastbeit import environment
from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.model.block import Block
from fastbeit.recipes import load_recipe
from fastbeit.training import compiling, distributed

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# What PyTorch's compiler warns of in itself, where warnings are errors: scripted functions that it
# imports, an instance of every autograd.Function that it meets, .grad of tensors that it looks at.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch to:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning"),
]
POSITIONS = torch.tensor([[0, 5, -1], [2, -1, -1]], dtype=torch.int32)
TARGETS = torch.tensor([[1, 2, 10**9], [3, -1, -1]])


@pytest.fixture
def amx(monkeypatch) -> None:
    """A CPU with bf16 products and a C++ compiler."""
    monkeypatch.setattr(environment, "cpu_bf16", lambda: "AMX")
    monkeypatch.setattr(compiling, "has_cpp_compiler", lambda: True)


def test_with_a_cuda_graph_blocks_are_compiled_in_bf16() -> None:
    chosen, reason = compiling.choose("auto", "bf16", GPU, 0.0, graph=True)
    assert chosen and "together with a CUDA graph" in reason
    assert not compiling.choose("auto", "fp32", GPU, 1e20, graph=True)[0]
    assert not compiling.choose("off", "bf16", GPU, 1e20, graph=True)[0]


@pytest.mark.parametrize(
    ("asked", "precision", "device", "flops", "chosen", "reason"),
    [
        ("auto", "bf16", CPU, 2e15, True, "2.0e+15 FLOP to do, and from 1e+15 on"),
        ("auto", "bf16", CPU, 5e14, False, "5.0e+14 FLOP to do"),
        ("auto", "fp32", CPU, 1e20, False, "without gain on a CPU in fp32"),
        ("auto", "bf16", GPU, 1e20, False, "slower on a GPU without a CUDA graph"),
        ("on", "fp32", CPU, 0.0, True, "asked for by name"),
        ("on", "bf16", GPU, 0.0, True, "asked for by name"),
        ("off", "bf16", CPU, 1e20, False, "asked for by name"),
    ],
)
def test_the_choice_and_its_reason(amx, asked, precision, device, flops, chosen, reason) -> None:
    found, said = compiling.choose(asked, precision, device, flops)
    assert found == chosen
    assert reason in said


def test_without_a_compiler_or_bf16_products(amx, monkeypatch) -> None:
    monkeypatch.setattr(environment, "cpu_bf16", lambda: None)
    assert not compiling.choose("auto", "bf16", CPU, 1e20)[0]
    monkeypatch.setattr(compiling, "has_cpp_compiler", lambda: False)
    assert compiling.choose("auto", "bf16", CPU, 1e20) == (False, "there is no C++ compiler")
    with pytest.raises(ValueError, match=r"--compile on needs a C\+\+ compiler"):
        compiling.choose("on", "bf16", CPU, 1e20)


def test_the_compiler_is_looked_for_where_it_will_be_taken_from(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not compiling.has_cpp_compiler()
    for name, path in (("g++", tmp_path / "g++"), ("own", tmp_path / "elsewhere" / "own")):
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        if name == "own":
            (tmp_path / "g++").unlink()
            monkeypatch.setenv("CXX", str(path))
        assert compiling.has_cpp_compiler(), name


def test_a_run_is_measured_by_its_whole_length_on_one_process(amx, world) -> None:
    base = load_recipe("beit-base-in1k")
    with torch.device("meta"):
        model = BeitForMim(BeitConfig(width=32, depth=1, heads=2))
    # 103 GFLOP an image, 2048 images a step: the fifth step passes 1e15.
    assert compiling.compile_blocks(model, base, world, 4, graph=False).startswith(
        "compile: off (a process"
    )
    assert compiling.compile_blocks(model, base, world, 5, graph=False).startswith(
        "compile: on (a process"
    )


def gradients(model: BeitForMim, images: torch.Tensor) -> dict[str, torch.Tensor]:
    drop = torch.tensor([[1.25, 0.0] * model.config.depth, [1.0, 1.25] * model.config.depth])
    model.loss(images, POSITIONS, TARGETS, drop_scale=drop).loss.backward()
    found: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    return {
        name: (grad.full_tensor() if isinstance(grad, DTensor) else grad)
        for name, grad in found.items()
    }


def test_checkpoint_compile_shard_change_no_gradient(amx, world, monkeypatch) -> None:
    """Traced and differentiated as on any device; only the code generator is left out."""
    monkeypatch.setattr(Block, "compile", lambda b: nn.Module.compile(b, backend="aot_eager"))
    config = BeitConfig(
        image_size=32, patch_size=8, width=32, depth=5, heads=2, vocab_size=24, layer_scale=0.3
    )
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = gradients(BeitForMim(config, seed=0), images)

    model = BeitForMim(config, seed=0)
    base = load_recipe("beit-base-in1k")
    torch._dynamo.reset()
    counters.clear()
    assert "on (" in compiling.compile_blocks(model, base, world, 500_000, graph=False)
    mesh = distributed.make_mesh(world, "zero3")
    distributed.shard_model(model, mesh, mode="zero3", precision="fp32")
    for name, grad in gradients(model, images).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-7, msg=name)
    # The first block has nothing pending and the last one rows; all between share a graph.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]

    frugal = BeitForMim(config, seed=0)
    frugal.set_checkpointing(True)
    assert "on (" in compiling.compile_blocks(frugal, base, world, 500_000, graph=False)
    distributed.shard_model(frugal, mesh, mode="zero3", precision="fp32")
    for name, grad in gradients(frugal, images).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_copies_of_the_weights_are_compiled_for_once(world, monkeypatch) -> None:
    """On one device every step puts other tensors in the weights' place."""
    config = BeitConfig(
        image_size=32, patch_size=8, width=32, depth=5, heads=2, vocab_size=24, layer_scale=0.3
    )
    found = []
    torch._dynamo.reset()
    counters.clear()
    for compiled in (False, True):
        model = BeitForMim(config, seed=0)
        for block in model.blocks:
            if compiled:
                nn.Module.compile(block, backend="aot_eager")
        placement = distributed.place_model(model, world, mode="none", precision="bf16")
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(2, 3, 32, 32, generator=generator).bfloat16()
            with placement.weights():
                gradients(model, images)
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    for name, grad in found[1].items():
        assert (grad - found[0][name]).norm() <= 2e-2 * found[0][name].norm(), name
