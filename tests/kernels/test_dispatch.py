"""Which calls take the kernels by themselves: where a GPU has shown them, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastbeit_kernels import SHOWN_ON_A_GPU, _dispatch, choose, not_shown

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def on_gpu(dtype: torch.dtype) -> Any:
    """What is asked of a tensor."""
    return SimpleNamespace(dtype=dtype, device=torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A GPU that can run them; its capability is the list's last."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability[-1])
    return capability


@pytest.mark.parametrize(
    ("operation", "dtype", "taken"),
    [
        ("attention_packed", BF16, "triton"),
        ("attention_packed", FP16, "triton"),
        ("attention_packed", FP32, "reference"),
        ("conv2d_channels_last", FP32, "reference"),  # cuDNN is ahead, and closer
        ("expand_rel_pos_bias", FP32, "triton"),  # a table is never anything else
        ("expand_rel_pos_bias", BF16, "reference"),
        ("scale_residual", BF16, "reference"),  # not timed
    ],
)
def test_auto_takes_what_was_shown(gpu: list, operation: str, dtype: torch.dtype, taken: str):
    assert choose(operation, "auto", on_gpu(dtype)) == taken
    assert choose(operation, "auto", on_gpu(dtype), unfit="too wide") == "reference"
    assert choose(operation, "triton", on_gpu(dtype)) == "triton"
    assert choose(operation, "reference", on_gpu(dtype)) == "reference"


def test_another_gpu_has_shown_nothing(gpu: list) -> None:
    assert not_shown("cuda", 0) is None
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        gpu.append(capability)
        said = f"capability {capability[0]}.{capability[1]} has shown them"
        assert said in (not_shown("cuda", 0) or "")
        assert choose("attention", "auto", on_gpu(BF16)) == "reference"
        assert choose("attention", "triton", on_gpu(BF16)) == "triton"
    assert not_shown("cpu", 0) is not None


def test_on_a_cpu_auto_is_the_reference() -> None:
    for operation in SHOWN_ON_A_GPU:
        assert choose(operation, "auto", torch.zeros(1, dtype=BF16)) == "reference"


def test_the_compiler_takes_the_answer_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a break in the graph, although a device is asked for its capability."""

    def nothing(device_type: str, device_index: int) -> None:
        return None

    nothing._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(_dispatch, "why_not", nothing)

    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if choose("attention", "auto", x) == "reference" else x

    graph = chosen(torch.zeros(2, dtype=BF16, device="meta"))  # no CPU, and no GPU that has shown
    assert graph.device.type == "meta"
