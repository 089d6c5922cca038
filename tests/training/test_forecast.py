"""Memory estimates against what autograd keeps, and the printed plan."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from fastbeit.model import BeitForMim
from fastbeit.recipes import load_recipe
from fastbeit.tokenizer import DvaeConfig
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

DALL_E = DvaeConfig()


# ---------------------------------------------------------------- memory and disk


def measured_activation_bytes(
    config: PretrainConfig, batch: int, *, checkpointing: bool = False
) -> int:
    """Bytes of the storages that autograd keeps, parameters and buffers left out; what checkpoints
    keep of their arguments included, what they compute again left out."""
    model_config, slots = config.model, config.mask.target
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.run.precision]
    model = BeitForMim(model_config, seed=0).to(dtype)
    if model.rel_pos is not None:
        model.rel_pos.float()
    model.set_checkpointing(checkpointing)
    given: dict[int, torch.Tensor] = {}
    for block in model.blocks if checkpointing else ():

        def keep(_, inputs: Any, words: Any) -> None:
            for tensor in (inputs[0], *(words["pending"] or ())[:1]):
                given[tensor.untyped_storage().data_ptr()] = tensor

        block.register_forward_pre_hook(keep, with_kwargs=True)
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
        return sum(tensor.untyped_storage().nbytes() for tensor in {**kept, **given}.values())


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


def test_checkpoints_keep_what_blocks_are_given() -> None:
    """The block that is computed again is seen by no hook here: counted out of the estimate."""
    base = load_recipe("beit-base-in1k")
    model = replace(base.model, width=192, heads=3, depth=4, vocab_size=64)
    config = replace(base, model=model, run=replace(base.run, precision="fp32"))
    measured = [measured_activation_bytes(config, n, checkpointing=True) for n in (1, 3)]
    an_image = (measured[1] - measured[0]) / 2 - 4 * config.mask.target * model.vocab_size
    estimates = [
        activation_bytes(
            replace(config, model=replace(model, depth=depth)),
            fused_attention=False,
            checkpointing=True,
        )
        for depth in (4, 5)
    ]
    inputs = 2 * 4 * model.tokens * model.width
    assert estimates[1] - estimates[0] == inputs
    one_block = estimates[0] - activation_bytes(
        replace(config, model=replace(model, depth=1)), fused_attention=False, checkpointing=True
    )
    assert one_block == 3 * inputs
    whole = activation_bytes(
        replace(config, model=replace(model, depth=2)), fused_attention=False
    ) - activation_bytes(replace(config, model=replace(model, depth=1)), fused_attention=False)
    assert estimates[0] - whole == pytest.approx(an_image, rel=0.03)


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
    assert "depends on the GPU" in plan["at 148 images/s a GPU"][1]
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
