"""Parameters, FLOPs, memory and the printed plan, against the modules and published counts."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.recipes import load_recipe
from fastbeit.tokenizer import DvaeConfig, Tokenizer
from fastbeit.tokenizer.dvae import Encoder
from fastbeit.training import cost
from fastbeit.training.config import MaskConfig, PretrainConfig
from fastbeit.training.forecast import forecast, print_forecast
from fastbeit.training.memory import (
    activation_bytes,
    checkpoint_bytes,
    encoder_numbers,
    rank_memory,
)
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


# ---------------------------------------------------------------- memory and disk


def measured_activation_bytes(config: PretrainConfig, batch: int) -> int:
    """Bytes of the storages that autograd keeps, parameters and buffers left out."""
    model_config, slots = config.model, config.mask.target
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.run.precision]
    model = BeitForMim(model_config, seed=0).to(dtype)
    if model.rel_pos is not None:
        model.rel_pos.float()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    own |= {tensor.untyped_storage().data_ptr() for tensor in model.buffers()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(batch, 3, *model_config.image_hw, dtype=dtype)
    positions = torch.arange(slots, dtype=torch.int32).expand(batch, -1)
    targets = torch.zeros(batch, slots, dtype=torch.int64)
    drop = torch.ones(batch, 2 * model_config.depth) if model_config.drop_path else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = model.loss(images, positions, targets, drop_scale=drop)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("precision", "changes", "fused"),
    [
        ("fp32", {}, False),
        ("bf16", {}, False),
        ("fp32", {"position": "absolute"}, True),
        ("fp32", {"position": "absolute", "layer_scale": None, "drop_path": 0.0}, True),
    ],
)
def test_activations_are_estimated_within_3_percent_of_what_autograd_keeps(
    precision: Any, changes: dict[str, Any], fused: bool
) -> None:
    """On a CPU, whose attention is plain with a trained bias or in bf16, and fused without."""
    base = load_recipe("beit-base-in1k")
    model = replace(base.model, width=192, heads=3, depth=3, vocab_size=64, **changes)
    config = replace(base, model=model, run=replace(base.run, precision=precision))
    # The difference of two batch sizes leaves out what is kept once (biases of all images).
    an_image = (measured_activation_bytes(config, 3) - measured_activation_bytes(config, 1)) / 2
    an_image -= 4 * config.mask.target * model.vocab_size  # log-probabilities: loss_head's
    assert activation_bytes(config, fused_attention=fused) == pytest.approx(an_image, rel=0.03)


def rank(config: PretrainConfig, shard: Any, world_size: int, local_size: int) -> Any:
    config = replace(config, run=replace(config.run, shard=shard))
    return rank_memory(
        config, DALL_E, 8, world_size=world_size, local_size=local_size, fused_attention=True
    )


def test_state_is_split_over_the_ranks_that_shard_it() -> None:
    config = load_recipe("beit-base-in1k")
    stored = cost.count_parameters(config.model).stored
    whole = rank(config, "none", 16, 8)
    assert (whole.master_weights, whole.gradients) == (4 * stored, 4 * stored)
    assert (whole.optimizer_state, whole.gathered_weights) == (8 * stored, 2 * stored)
    for shard, shards in (("zero2", 16), ("zero3", 16), ("hybrid", 8)):
        part = rank(config, shard, 16, 8)
        assert part.optimizer_state == pytest.approx(8 * stored / shards, rel=1e-5)
        assert part.master_weights == pytest.approx(4 * stored / shards, rel=1e-5)
        assert (part.gathered_weights < whole.gathered_weights) == (shard != "zero2")
        assert part.activations == whole.activations
        assert part.peak < whole.peak


def test_memory_peaks_in_the_student_or_in_the_tokenizer() -> None:
    config = load_recipe("beit-base-in1k")
    base = rank(config, "none", 1, 1)
    lasting = (
        base.master_weights
        + base.gradients
        + base.optimizer_state
        + base.gathered_weights
        + base.tokenizer_weights
    )
    assert base.peak == lasting + base.activations + base.loss_head
    shallow = replace(config, model=replace(config.model, depth=1, vocab_size=64))
    small = rank(shallow, "none", 1, 1)
    assert small.tokenizer_activations > small.activations + small.loss_head
    assert small.peak < base.peak


def test_encoder_and_checkpoint_bytes() -> None:
    with torch.device("meta"):
        encoder = Encoder(DALL_E)
    assert encoder_numbers(DALL_E) == sum(p.numel() for p in encoder.parameters()) == 53_786_240
    model = load_recipe("beit-base-in1k").model
    assert checkpoint_bytes(model) == 12 * cost.count_parameters(model).stored


# ---------------------------------------------------------------- the printed plan


def rows(config: PretrainConfig, **options: Any) -> dict[str, tuple[str, str]]:
    return {
        row.name: (row.value, row.note)
        for section in forecast(config, **options)
        for row in section.rows
    }


def test_the_plan_of_the_base_recipe() -> None:
    plan = rows(load_recipe("beit-base-in1k"), gpus=16)
    assert plan["parameters"][0] == "91,965,776"
    assert plan["steps"] == ("500,000", "800 epochs; warm-up 6,250 steps")
    assert plan["images seen"][0] == "1,024,000,000"
    assert plan["images"] == ("1,281,167", "nominal for beit-base-in1k: no --data given")
    assert "36.1 GFLOP without" in plan["student, forward"][1]
    assert "160 GFLOP without" in plan["whole step"][1]
    # 16 GPUs at the published rate: the paper's "about five days".
    assert plan["at 148 images/s a GPU"][0] == "120 h"
    assert "not measured yet" in plan["at 148 images/s a GPU"][1]
    assert plan["a checkpoint"][0] == "1.1 GB"


def test_a_given_rate_is_a_gpus_rate() -> None:
    config = load_recipe("beit-base-in1k")
    assert rows(config, gpus=1, images_per_s=1000)["at 1000 images/s a GPU"][0] == "284 h"
    assert rows(config, gpus=8, images_per_s=1000)["at 1000 images/s a GPU"][0] == "36 h"
    assert rows(load_recipe("beit-large-in1k"), gpus=8)["hours"][0] == "not known"


def test_fewer_gpus_accumulate_and_say_so() -> None:
    plan = rows(load_recipe("beit-base-in1k"), gpus=2)
    assert plan["global batch"][1].startswith("2 ranks x 128 images x 8 accumulation steps: the")


def test_images_are_counted_where_the_data_are_and_nominal_where_not() -> None:
    demo = load_recipe("demo")
    assert rows(demo, gpus=1)["images"] == ("10,000", "in demo")
    missing = replace(demo, recipe="custom", data=replace(demo.data, data="/not/there"))
    value, note = rows(missing, gpus=1)["images"]
    assert value == "1,281,167"
    assert note == "ImageNet-1k's number: /not/there does not exist"


def test_what_the_plan_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be split evenly over 3 ranks"):
        forecast(load_recipe("beit-base-in1k"), gpus=3)


def test_an_unreadable_tokenizer_is_said_to_be_replaced() -> None:
    config = load_recipe("beit-base-in1k")
    config = replace(config, tokenizer=replace(config.tokenizer, tokenizer="/not/there"))
    assert "DALL-E's encoder stands in: /not/there" in rows(config, gpus=1)["tokenizer, forward"][1]


def test_the_plan_prints_every_row_within_its_width() -> None:
    config = replace(load_recipe("beit-base-in1k"), mask=MaskConfig(target=60))
    assert rows(config, gpus=8)["tokenizer, forward"][1].endswith("at all 196 tokens, not 60")
    text = io.StringIO()
    print_forecast(config, gpus=8, console=Console(file=text, width=110))
    printed = text.getvalue()
    assert max(map(len, printed.splitlines())) <= 110
    for section in forecast(config, gpus=8):
        assert section.title in printed
        for row in section.rows:
            assert f" {row.name} " in printed
            assert row.value in printed
