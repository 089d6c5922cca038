"""The reference of embed_patches against the formula written out, and what the model hands it."""

from __future__ import annotations

import pytest
import torch

from fastbeit.model import BeitConfig
from fastbeit.model.mim import BeitForMim
from fastbeit_kernels import embed_patches


def draw(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def written_out(images, weight, bias, cls_token, positions, mask_token, pos_embed):
    """Token by token: what a projection, a mask and a position are."""
    lines, across = weight.shape[2:]
    rows = []
    for b, image in enumerate(images):
        hidden = set() if positions is None else set(positions[b].tolist())
        tokens = [cls_token]
        for y in range(0, image.shape[1], lines):
            for x in range(0, image.shape[2], across):
                patch = image[:, y : y + lines, x : x + across]
                token = (weight * patch).sum((1, 2, 3))
                token = token if bias is None else token + bias
                tokens.append(mask_token if len(tokens) - 1 in hidden else token)
        rows.append(torch.stack(tokens))
    out = torch.stack(rows)
    return out if pos_embed is None else out + pos_embed


def parameters(width=5, channels=2, patch=(3, 2), tokens=13):
    return [
        draw(width, channels, *patch, seed=1).requires_grad_(),
        draw(width, seed=2).requires_grad_(),
        draw(width, seed=3).requires_grad_(),
        draw(width, seed=4).requires_grad_(),
        draw(tokens, width, seed=5).requires_grad_(),
    ]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_values_and_gradients_of_the_formula(with_bias, with_positions, masked) -> None:
    """A 3 x 4 grid of 3 x 2 patches; positions out of order, repeated, and empty."""
    images = draw(3, 2, 9, 8, seed=0).requires_grad_()
    weight, bias, cls_token, mask_token, pos_embed = parameters()
    positions = torch.tensor([[7, 0, 7, -1], [-1, -1, -1, -1], [11, 10, 1, 2]])
    chosen = {
        "bias": bias if with_bias else None,
        "positions": positions if masked else None,
        "mask_token": mask_token,
        "pos_embed": pos_embed if with_positions else None,
    }
    out = embed_patches(images, weight, cls_token=cls_token, **chosen, impl="reference")
    expected = written_out(images, weight, cls_token=cls_token, **chosen)
    torch.testing.assert_close(out, expected)
    inputs = [images, weight, cls_token, *(x for x in chosen.values() if x is not None)]
    inputs = [x for x in inputs if x.is_floating_point() and (masked or x is not mask_token)]
    mix = draw(*out.shape, seed=6)
    for mine, theirs in zip(
        torch.autograd.grad(out, inputs, mix),
        torch.autograd.grad(expected, inputs, mix),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_masked_patch_is_not_looked_at() -> None:
    images, (weight, bias, cls_token, mask_token, _) = draw(1, 2, 9, 8, seed=0), parameters()
    positions = torch.tensor([[4]], dtype=torch.int16)
    arguments = (weight, bias, cls_token)
    clean = embed_patches(images, *arguments, positions=positions, mask_token=mask_token)
    # Patch 4 is the first of the second row: lines 3 to 5, columns 0 and 1.
    images[:, :, 3:6, :2] = float("nan")
    dirty = embed_patches(images, *arguments, positions=positions, mask_token=mask_token)
    assert torch.equal(clean, dirty) and torch.equal(dirty[0, 5], mask_token)


def test_the_result_is_as_wide_as_what_it_is_made_of() -> None:
    half, wide = torch.bfloat16, torch.float32
    images = draw(1, 2, 9, 8, seed=0, dtype=wide)
    weight, bias, cls_token, mask_token, pos_embed = (x.detach().to(half) for x in parameters())
    out = embed_patches(images, weight, bias, cls_token, mask_token=mask_token.to(wide))
    assert out.dtype == half, "a mask token that masks nothing widens nothing"
    positions = torch.zeros(1, 1, dtype=torch.int64)
    for widened in ("cls_token", "mask_token", "pos_embed"):
        given = {"cls_token": cls_token, "mask_token": mask_token, "pos_embed": pos_embed}
        given[widened] = given[widened].to(wide)
        cls = given.pop("cls_token")
        out = embed_patches(images, weight, bias.to(wide), cls, positions=positions, **given)
        assert out.dtype == wide, widened


def test_the_model_embeds_by_the_formula() -> None:
    config = BeitConfig(
        image_size=(6, 8), patch_size=2, width=8, depth=1, heads=2, position="absolute"
    )
    encoder = BeitForMim(config).double()
    with torch.no_grad():
        for seed, parameter in enumerate(encoder.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
    images = draw(2, 3, 6, 8, seed=0)
    positions = torch.tensor([[3, 1, -1], [0, 11, 5]], dtype=torch.int32)
    projection = encoder.patch_embed.proj
    expected = written_out(
        images,
        projection.weight,
        projection.bias,
        encoder.cls_token.flatten(),
        positions,
        encoder.mask_token.flatten(),
        encoder.pos_embed[0],
    )
    torch.testing.assert_close(encoder.embed(images, positions), expected)
