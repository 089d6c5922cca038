"""Parameters, FLOPs and peaks, against the modules and published counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.recipes import load_recipe
from fastbeit.tokenizer import DvaeConfig, Tokenizer
from fastbeit.tokenizer.dvae import Encoder
from fastbeit.training import cost
from fastbeit.training.peak import GPUS, peak_flops

SMALL = BeitConfig(
    image_size=(24, 40), patch_size=8, in_channels=2, width=32, depth=3, heads=4, vocab_size=50
)
DALL_E = DvaeConfig()


def gflop(count: float) -> float:
    return count / 1e9


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position": "absolute", "layer_scale": None},
        {"position": "relative_per_block"},
        {"position": "none", "layer_scale": None, "mlp_ratio": 2.5},
        {"in_channels": 5, "patch_size": 4, "depth": 1},
    ],
)
def test_parameters_are_counted_as_the_model_has_them(changes: dict[str, Any]) -> None:
    config = replace(SMALL, **changes)
    with torch.device("meta"):
        model = BeitForMim(config)
    counted = cost.count_parameters(config)
    assert counted.trained == model.parameter_count()
    assert counted.stored == sum(parameter.numel() for parameter in model.parameters())


def test_parameters_of_the_published_models() -> None:
    assert cost.count_parameters(BeitConfig()).trained == 91_965_776
    paper = BeitConfig(position="absolute", layer_scale=None)
    assert cost.count_parameters(paper).trained == 92_089_856


# ---------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("pruned", [True, False])
def test_student_flops_are_those_that_pytorch_counts(pruned: bool) -> None:
    batch, slots = 2, 6
    model = BeitForMim(SMALL, seed=0)
    images = torch.randn(batch, SMALL.in_channels, *SMALL.image_hw)
    positions = torch.arange(slots, dtype=torch.int32).expand(batch, -1)
    targets = torch.zeros(batch, slots, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        loss = model.loss(images, positions, targets, prune=pruned).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    expected = cost.student_flops(SMALL, slots, pruned=pruned)
    assert forward.get_total_flops() == batch * expected.forward
    assert backward.get_total_flops() == batch * expected.backward


def test_student_flops_of_the_base_model() -> None:
    """The counted table: 0.12, 16.73, 0.715 and 0.472 GMAC; 36.1 forward and 71.9 GFLOP back."""
    flops = cost.student_flops(BeitConfig(), 75, pruned=False)
    assert gflop(flops.patch_embedding) / 2 == pytest.approx(0.12, abs=0.005)
    assert gflop(flops.block_linears) / 2 == pytest.approx(16.73, abs=0.005)
    assert gflop(flops.attention) / 2 == pytest.approx(0.715, abs=0.0005)
    assert gflop(flops.head) / 2 == pytest.approx(0.472, abs=0.0005)
    assert gflop(flops.forward) == pytest.approx(36.1, abs=0.05)
    assert gflop(flops.backward) == pytest.approx(71.9, abs=0.05)
    pruned = cost.student_flops(BeitConfig(), 75)
    assert 1 - pruned.block_linears / flops.block_linears == pytest.approx(0.043, abs=0.0005)


@pytest.mark.parametrize("slots", [None, 3])
def test_tokenizer_flops_are_those_that_pytorch_counts(slots: int | None) -> None:
    config = DvaeConfig(channels=1, codes=24, widths=(8, 16, 32), blocks_per_group=2, kernel=5)
    grid = (3, 5)
    tokenizer = Tokenizer(_encoder(config))
    images = torch.rand(1, 1, grid[0] * config.stride, grid[1] * config.stride)
    positions = None if slots is None else torch.arange(slots)[None]
    with FlopCounterMode(display=False) as counter:
        tokenizer.encode(images, positions)
    assert counter.get_total_flops() == cost.tokenizer_flops(config, grid, slots).total


def test_flops_of_the_published_tokenizer_and_of_a_whole_step() -> None:
    tokens = cost.tokenizer_flops(DALL_E, (14, 14))
    assert gflop(tokens.total) / 2 == pytest.approx(26.06, abs=0.005)
    assert gflop(tokens.head) / 2 == pytest.approx(3.29, abs=0.005)
    student = cost.student_flops(BeitConfig(), 75, pruned=False)
    assert gflop(student.total + tokens.total) == pytest.approx(160, abs=0.5)
    config = load_recipe("beit-base-in1k")
    computed = cost.step_flops(config, cost.tokenizer_flops(DALL_E, (14, 14), 75).total)
    assert computed < 0.96 * (student.total + tokens.total)
    assert computed - cost.step_flops(config, 0) == tokens.body + tokens.head * 75 // 196


def _encoder(config: DvaeConfig) -> Encoder:
    encoder = Encoder(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder


# ---------------------------------------------------------------- peaks


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA A100 80GB PCIe", "bf16", 312),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla T4", "fp32", 8.1),
    ],
)
def test_known_gpus_have_their_stated_peak(name: str, precision: Any, tflops: float) -> None:
    peak = peak_flops(name, precision)
    assert peak.flops_per_s == pytest.approx(tflops * 1e12)
    assert f"{tflops:g} TFLOP/s" in peak.source
    assert precision in peak.source


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "Tesla T4",
        "Tesla V100-SXM2-32GB",
        "Some Future GPU",
    ],
)
def test_what_is_not_on_record_has_no_peak(name: str) -> None:
    peak = peak_flops(name, "bf16")
    assert peak.flops_per_s is None
    assert peak.source.startswith("no ")


def test_peaks_are_ordered_as_the_hardware_is() -> None:
    assert all(gpu.bf16 is None or gpu.fp32 is None or gpu.bf16 > gpu.fp32 for gpu in GPUS)
    assert len({gpu.label for gpu in GPUS}) == len(GPUS)


def test_mfu_is_arithmetic_over_peak() -> None:
    config = load_recipe("beit-base-in1k")
    tokenizer = Tokenizer(_encoder(DvaeConfig(codes=24, widths=(8, 16, 32, 64))))
    meter = cost.mfu_meter(config, tokenizer, "NVIDIA H100 80GB HBM3")
    encoder = cost.tokenizer_flops(tokenizer.config, (14, 14), 75).total
    assert meter.flops_per_image == cost.step_flops(config, encoder)
    images_per_s = 0.5 * 989e12 / meter.flops_per_image
    assert meter.mfu(images_per_s) == pytest.approx(0.5)
    assert meter.label == "989 TFLOP/s, H100 SXM bf16 dense (NVIDIA data sheet)"
    on_cpu = cost.mfu_meter(config, tokenizer, torch.device("cpu"))
    assert (on_cpu.mfu(1000.0), on_cpu.label) == (None, None)
