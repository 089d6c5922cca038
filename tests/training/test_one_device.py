"""One rank without FSDP2 against one rank with it: the same bits."""

from __future__ import annotations

import pytest
import torch

from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.training import distributed
from fastbeit.training.distributed import local_shard
from fastbeit.training.one_device import WorkingWeights

POSITIONS = torch.tensor([[0, 5, 9], [2, 3, -1]], dtype=torch.int32)
TARGETS = torch.tensor([[1, 2, 3], [4, 5, 0]])


def model_of(position: str = "relative") -> BeitForMim:
    config = BeitConfig(
        image_size=32,
        patch_size=8,
        width=32,
        depth=4,
        heads=2,
        vocab_size=24,
        layer_scale=0.3,
        position=position,  # type: ignore[arg-type]
    )
    model = BeitForMim(config, seed=0)
    if model.rel_pos is not None:
        with torch.no_grad():
            model.rel_pos.relative_position_bias_table.normal_(
                generator=torch.Generator().manual_seed(1)
            )
    return model


def images_of(number: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(2, 3, 32, 32, generator=generator).to(dtype)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("position", ["relative", "relative_per_block", "absolute"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_those_of_fsdp_to_the_bit(world, precision, position, checkpointing) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sharded, plain = model_of(position), model_of(position)
    mesh = distributed.make_mesh(world, "none")
    distributed.shard_model(sharded, mesh, mode="none", precision=precision)
    placement = distributed.place_model(plain, world, mode="none", precision=precision)
    plain.set_checkpointing(checkpointing)
    assert placement.copies == 1
    for micro in range(3):  # accumulated
        images = images_of(micro, dtype)
        sharded.set_requires_gradient_sync(micro == 2)  # type: ignore[attr-defined]
        expected = sharded.loss(images, POSITIONS, TARGETS)
        expected.loss.backward()
        with placement.weights():
            found = plain.loss(images, POSITIONS, TARGETS)
            found.loss.backward()
        assert torch.equal(found.loss, expected.loss)
    for (name, theirs), ours in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32, name
        assert torch.equal(local_shard(theirs.grad), ours.grad), name
        assert ours.grad.any(), name


def test_masters_are_back_after_a_pass_and_after_an_error() -> None:
    model = model_of()
    before = dict(model.named_parameters())
    weights = WorkingWeights(model, torch.bfloat16, (model.rel_pos,))
    with pytest.raises(RuntimeError, match="in between"), weights():
        inside = {name: p for module in model.modules() for name, p in module._parameters.items()}
        assert inside["cls_token"].dtype == torch.bfloat16
        assert inside["relative_position_bias_table"].dtype == torch.float32
        raise RuntimeError("in between")
    assert all(p is before[name] for name, p in model.named_parameters())
    assert list(dict(model.named_parameters())) == list(before)


def test_fp32_computes_with_the_masters_themselves() -> None:
    model = model_of()
    before = dict(model.named_parameters())
    with WorkingWeights(model, torch.float32)():
        assert all(p is before[name] for name, p in model.named_parameters())
    with WorkingWeights(model, torch.bfloat16)():
        assert not any(p is before[name] for name, p in model._parameters.items() if p is not None)


def test_a_weight_without_a_gradient_stays_without() -> None:
    """AdamW would decay it."""
    model = model_of()
    model.unused = torch.nn.Parameter(torch.ones(3))
    with WorkingWeights(model, torch.bfloat16)():
        model.loss(images_of(0, torch.bfloat16), POSITIONS, TARGETS).loss.backward()
    assert model.unused.grad is None


def test_gradients_are_handed_over_and_not_copied(monkeypatch) -> None:
    """368 MB of ViT-B's would be written and read again."""
    made: list[int] = []
    copy = torch._foreach_copy_

    def spy(into, given):
        made.extend(tensor.data_ptr() for tensor in into)
        return copy(into, given)

    monkeypatch.setattr(torch, "_foreach_copy_", spy)
    model = model_of()
    with WorkingWeights(model, torch.bfloat16, (model.rel_pos,))():
        model.loss(images_of(0, torch.bfloat16), POSITIONS, TARGETS).loss.backward()
    for name, parameter in model.named_parameters():
        if "relative_position" not in name:
            assert parameter.grad.data_ptr() in made, name
