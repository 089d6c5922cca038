"""The masked loss: pruning is exact, empty slots are ignored, DropPath follows its factors."""

from __future__ import annotations

import copy

import pytest
import torch

from fastbeit.model import BeitConfig, BeitForMim

CONFIG = BeitConfig(image_size=32, patch_size=8, width=32, depth=3, heads=2, vocab_size=24)


def make_model(**changes) -> BeitForMim:
    model = BeitForMim(BeitConfig(**{**vars(CONFIG), **changes}), seed=1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # start values are so small that errors could hide
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("qkv.bias"):
                noise.unflatten(0, (3, -1))[1] = 0
            parameter.add_(0.2 * noise)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()


POSITIONS = torch.tensor([[0, 5, 9, 15], [2, 3, -1, -1], [-1, -1, -1, -1]], dtype=torch.int32)
TARGETS = torch.tensor([[3, 23, 0, 7], [9, 11, -5, 10**12], [24, -1, 2**40, 0]])
DROP = torch.tensor(
    [[1.0, 1.0, 0.0, 1.25, 1.25, 0.0], [1.0, 1.0, 1.25, 0.0, 0.0, 1.25], [1.0] * 6]
).double()


def loss_and_gradients(model, *arguments, **options):
    out = model.loss(*arguments, **options)
    gradients = torch.autograd.grad(out.loss, list(model.parameters()))
    return out, dict(zip((n for n, _ in model.named_parameters()), gradients, strict=True))


@pytest.mark.parametrize("drop_scale", [None, DROP], ids=["kept", "dropped"])
@pytest.mark.parametrize("position", ["relative", "relative_per_block", "absolute", "none"])
def test_pruned_is_exact_in_values_and_gradients(images, position, drop_scale) -> None:
    model = make_model(position=position)
    options = {"drop_scale": drop_scale}
    pruned, ours = loss_and_gradients(model, images, POSITIONS, TARGETS, **options)
    whole, theirs = loss_and_gradients(model, images, POSITIONS, TARGETS, prune=False, **options)
    assert pruned.count.item() == whole.count.item() == 6
    assert pruned.correct.item() == whole.correct.item()
    torch.testing.assert_close(pruned.loss, whole.loss, rtol=1e-6, atol=0)  # the loss is fp32
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-6, atol=1e-9, msg=name)
        assert ours[name].norm() > 0, name
    torch.testing.assert_close(
        model(images, POSITIONS), model(images, POSITIONS, prune=False), rtol=1e-10, atol=1e-12
    )


def test_pruned_last_block_computes_masked_rows_alone(images) -> None:
    model = make_model()
    rows = {}

    def note(number: int):
        def hook(module, inputs, output) -> None:
            rows[number] = output.shape[1]

        return hook

    for number, block in enumerate(model.blocks):
        block.mlp.fc1.register_forward_hook(note(number))
    asked = []
    model.blocks[-1].register_forward_pre_hook(lambda module, inputs: asked.append(inputs[3]))
    model.loss(images, POSITIONS, TARGETS)
    assert rows == {0: 17, 1: 17, 2: 4}
    # As tokens, behind CLS; an empty slot stays one, so that kernels can skip it.
    assert asked[0].tolist() == [[1, 6, 10, 16], [3, 4, -1, -1], [-1] * 4]


def test_empty_slots_change_nothing(images) -> None:
    """Neither the targets behind them nor their place among the slots nor their number."""
    model = make_model()
    expected, gradients = loss_and_gradients(model, images, POSITIONS, TARGETS)
    other_garbage = torch.where(POSITIONS >= 0, TARGETS, 1)
    mixed = torch.tensor([3, 1, 0, 2])
    wider = torch.cat((POSITIONS, torch.full((3, 5), -1, dtype=torch.int32)), 1)
    wider_targets = torch.cat((TARGETS, torch.full((3, 5), -7)), 1)
    for positions, targets in (
        (POSITIONS, other_garbage),
        (POSITIONS[:, mixed], TARGETS[:, mixed]),
        (wider, wider_targets),
        (POSITIONS.long(), TARGETS),
    ):
        out, ours = loss_and_gradients(model, images, positions, targets)
        assert (out.correct.item(), out.count.item()) == (expected.correct.item(), 6)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
        for name in ours:
            torch.testing.assert_close(ours[name], gradients[name], rtol=2e-6, atol=1e-9)


def test_the_mean_is_over_slots_and_not_over_images(images) -> None:
    model = make_model()
    whole = model.loss(images, POSITIONS, TARGETS)
    each = [model.loss(images[i : i + 1], POSITIONS[i : i + 1], TARGETS[i : i + 1]) for i in (0, 1)]
    assert [out.count.item() for out in each] == [4, 2]
    torch.testing.assert_close(whole.loss, (4 * each[0].loss + 2 * each[1].loss) / 6)


@pytest.mark.parametrize("prune", [True, False])
def test_no_filled_slot_is_zero_without_nan(images, prune) -> None:
    model = make_model()
    empty = torch.full((3, 4), -1, dtype=torch.int32)
    out, gradients = loss_and_gradients(model, images, empty, TARGETS, prune=prune)
    assert out.loss.item() == out.correct.item() == out.count.item() == 0
    for name, gradient in gradients.items():
        assert gradient.eq(0).all(), name


def test_masked_patches_are_unseen_and_empty_slots_touch_none(images) -> None:
    model = make_model(position="absolute")
    empty = torch.full((3, 4), -1, dtype=torch.int32)
    assert torch.equal(model.features(images, empty), model.features(images))
    changed = images.clone()
    changed[0, :, 8:16, 8:16] += 1  # patch 5 of image 0
    seen = model.features(changed)[0], model.features(images)[0]
    assert not torch.allclose(*seen)
    assert torch.equal(model.features(changed, POSITIONS), model.features(images, POSITIONS))
    tokens = model.embed(images, POSITIONS) - model.pos_embed
    for b, row in enumerate(POSITIONS.tolist()):
        for patch in range(16):
            is_token = torch.allclose(tokens[b, 1 + patch], model.mask_token[0, 0])
            assert is_token == (patch in row)
        torch.testing.assert_close(tokens[b, 0], model.cls_token[0, 0])


def test_drop_path_scales_each_branch_of_each_image(images) -> None:
    model = make_model(position="none", layer_scale=0.3)
    x = model.embed(images, POSITIONS)
    for number, block in enumerate(model.blocks):
        for part, norm, gamma, column in (
            (lambda y, b=block: b.attn(y, None), block.norm1, block.gamma_1, 2 * number),
            (block.mlp, block.norm2, block.gamma_2, 2 * number + 1),
        ):
            x = x + DROP[:, column, None, None] * gamma * part(norm(x))
    torch.testing.assert_close(model.encode(images, POSITIONS, drop_scale=DROP), x)
    none = model.encode(images, POSITIONS, drop_scale=torch.zeros(3, 6).double())
    torch.testing.assert_close(none, model.embed(images, POSITIONS))


def test_key_bias_never_moves_under_adamw(images) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    before = copy.deepcopy(model.blocks[0].attn.qkv.bias.detach())
    for prune in (True, False, True):
        optimizer.zero_grad()
        model.loss(images, POSITIONS, TARGETS, prune=prune).loss.backward()
        optimizer.step()
    for block in model.blocks:
        q, k, v = block.attn.qkv.bias.detach().chunk(3)
        assert k.eq(0).all() and q.ne(0).all() and v.ne(0).all()
    q, _, v = (model.blocks[0].attn.qkv.bias.detach() - before).chunk(3)
    assert q.abs().min() > 1e-4 and v.abs().min() > 1e-4


def test_layer_features_are_the_blocks_outputs(images) -> None:
    model = make_model()
    layers = model.layer_features(images)
    assert [tuple(layer.shape) for layer in layers] == [(3, 17, 32)] * 3
    torch.testing.assert_close(model.norm(layers[-1]), model.features(images))
    torch.testing.assert_close(model.blocks[1](layers[0], model.rel_pos()), layers[1])
