"""bf16 with and without FSDP2: what the blocks are handed, and what stays fp32 to the last bit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.training import distributed
from fastbeit_kernels import expand_rel_pos_bias


@pytest.mark.parametrize("mode", ["one device", "none", "zero2", "zero3"])
def test_the_shared_bias_and_its_gradient_are_never_rounded(world, mode) -> None:
    config = BeitConfig(image_size=32, patch_size=8, width=32, depth=4, heads=2, vocab_size=24)
    model = BeitForMim(config, seed=0)
    table = model.rel_pos.relative_position_bias_table
    with torch.no_grad():
        table.normal_(generator=torch.Generator().manual_seed(1))
    exact = expand_rel_pos_bias(table.detach(), model.rel_pos.relative_position_index)
    assert not torch.equal(exact, exact.bfloat16().float())
    weights = nullcontext
    if mode == "one device":
        weights = distributed.place_model(model, world, mode="none", precision="bf16").weights
    else:
        mesh = distributed.make_mesh(world, mode)
        distributed.shard_model(model, mesh, mode=mode, precision="bf16")

    handed, factors = [], []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, inputs: handed.append(inputs[:2]))
        block.register_forward_pre_hook(lambda module, inputs: factors.append(inputs[2]))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.tensor([[0, 5, 9], [2, 3, -1]], dtype=torch.int32)
    drop = torch.full((2, 8), 1.0 / 0.9)
    with weights():
        out = model.loss(images, positions, positions.long(), drop_scale=drop)
        out.loss.backward()

    assert len(handed) == 4 and out.loss.dtype == torch.float32
    for normed, bias in handed:
        assert normed.dtype == torch.bfloat16
        assert torch.equal(bias, exact)
    for factor in factors:
        assert torch.equal(factor, drop[:, :2])
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
    gradient = distributed.local_shard(model.rel_pos.relative_position_bias_table.grad)
    assert not torch.equal(gradient, gradient.bfloat16().float())
