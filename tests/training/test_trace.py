"""Time by phase and part: on made-up events by hand, and on a real profiled step."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastbeit.training import trace
from fastbeit.training.cost import StudentFlops, TokenizerFlops
from fastbeit.training.step import phase


@dataclass
class Made:
    """An operation from ``start`` µs that spent ``own`` µs itself and ``device`` on the GPU."""

    name: str
    start: float
    own: float = 0.0
    device: float = 0.0
    length: float = 1.0
    cpu_parent: Any = None
    device_type: DeviceType = DeviceType.CPU
    time_range: Any = field(init=False)

    def __post_init__(self) -> None:
        self.time_range = SimpleNamespace(start=self.start, end=self.start + self.length)

    @property
    def self_cpu_time_total(self) -> float:
        return self.own

    @property
    def self_device_time_total(self) -> float:
        return self.device


def made_up() -> list[Made]:
    head = Made("fastbeit_kernels::masked_cross_entropy_forward", 36, own=1)
    return [
        Made("fastbeit: load", 0, own=9, length=10),
        Made("aten::copy_", 2, own=5, device=5),  # the loader's: part of the wait
        Made("fastbeit: tokenize", 10, own=1, length=10),
        Made("aten::mkldnn_convolution", 11, own=6, device=60),
        Made("fastbeit: forward", 30, own=2, length=10),
        Made("aten::addmm", 31, own=3, device=30),
        Made("aten::_log_softmax", 32, own=1, device=10),
        Made("aten::_softmax", 33, own=1, device=20),
        head,
        Made("aten::mm", 36, own=2, device=4, cpu_parent=head),
        # On the engine's thread, while the main one waits in the backward.
        Made("fastbeit: backward", 40, own=0, length=20),
        Made("aten::bmm", 45, own=7, device=70),
        Made("aten::add", 61, own=100, device=100),  # between the phases
    ]


def test_on_a_cpu_own_time_goes_to_phase_and_part() -> None:
    times = trace.time_by_part(made_up(), on_gpu=False)
    assert times == {
        ("load", "waiting"): 9,
        ("tokenize", "other"): 1,
        ("tokenize", "convolutions"): 6,
        ("forward", "other"): 2,
        ("forward", "linear layers"): 5,
        ("forward", "loss and argmax"): 2,
        ("forward", "attention"): 1,
        ("backward", "other"): 0,
        ("backward", "attention"): 7,
    }


def test_on_a_gpu_it_is_the_kernels_time_and_the_wait_for_data() -> None:
    times = trace.time_by_part(made_up(), on_gpu=True)
    assert times == {
        ("load", "waiting"): 9,
        ("tokenize", "convolutions"): 60,
        ("forward", "linear layers"): 34,
        ("forward", "loss and argmax"): 10,
        ("forward", "attention"): 20,
        ("backward", "attention"): 70,
    }


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("fastbeit_kernels::attention_packed_backward", "attention"),
        ("aten::_softmax_backward_data", "attention"),
        ("aten::_log_softmax_backward_data", "loss and argmax"),
        ("aten::embedding_dense_backward", "relative table"),
        ("aten::native_layer_norm_backward", "norms and residuals"),
        ("aten::convolution_backward", "convolutions"),
        ("mkldnn::_linear_pointwise", "linear layers"),
        ("aten::addmm", "linear layers"),
        ("aten::addmv", "other"),
        ("aten::gelu_backward", "GELU"),
        ("aten::_fused_adamw_", "optimizer"),
        ("c10d::allreduce_", "communication"),
        ("graph_0_cpp_fused_gelu_1", "GELU"),
        ("aten::copy_", "copies and casts"),
        ("aten::mul", "other"),
    ],
)
def test_parts_by_name(name, part) -> None:
    assert trace.part_of(Made(name, 0)) == part


def test_an_operations_own_name_counts_before_its_callers() -> None:
    caller = Made("autograd::engine::evaluate_function: ConvolutionBackward0", 0)
    convolution = Made("aten::convolution_backward", 0, cpu_parent=caller)
    assert trace.part_of(Made("aten::gelu", 0, cpu_parent=convolution)) == "GELU"
    assert trace.part_of(Made("aten::empty", 0, cpu_parent=convolution)) == "convolutions"


def test_rows_stand_beside_their_roofline() -> None:
    student = StudentFlops(patch_embedding=1, block_linears=20, attention=4, head=5)
    flops = trace.counted(student, TokenizerFlops(body=50, head=10), images=10**9)
    assert flops["backward", "linear layers"] == 2 * flops["forward", "linear layers"] == 50e9
    forward_and_back = sum(value for (stage, _), value in flops.items() if stage != "tokenize")
    assert forward_and_back == student.total * 1e9
    times = {("forward", "linear layers"): 20_000.0, ("forward", "GELU"): 20_000.0}
    first, second = trace.rows(times, 2, flops, {"forward": 5e12})
    assert (first.ms, first.share, first.limit_ms) == (10.0, 0.5, 5.0)
    assert (first.of_limit, first.tflops_per_s) == (0.5, 2.5)
    assert second.part == "GELU" and second.limit_ms is None
    text = trace.table([first, second])
    assert text.splitlines()[1].split() == [
        *("forward", "linear", "layers", "10.00", "50.0%", "25.0", "2.50", "5.00", "50%")
    ]
    assert text.splitlines()[-1].split()[:3] == ["step", "20.00", "100.0%"]


def test_a_real_trace_accounts_for_the_step() -> None:
    """The backward runs on a thread of the engine's; its work is found all the same."""
    layer = torch.nn.Linear(256, 256)
    x = torch.randn(512, 256)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        with phase("forward"):
            out = torch.nn.functional.gelu(layer(x)).sum()
        with phase("backward"):
            out.backward()
    times = trace.time_by_part(profiler.events(), on_gpu=False)
    for stage in ("forward", "backward"):
        assert times[stage, "linear layers"] > 0 and times[stage, "GELU"] > 0
    whole_us = sum(
        event.cpu_time_total for event in profiler.events() if event.name.startswith(trace.PREFIX)
    )
    assert sum(times.values()) == pytest.approx(whole_us, rel=0.35)
