"""embed_patches in Triton as an operator: dtypes, autocast, compilation, checkpoints, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastbeit_kernels import embed_patches

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16)


def draw(*shape, seed=0, grad=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    drawn = torch.randn(*shape, generator=generator).to(DEVICE, dtype)
    return drawn.requires_grad_(grad)


def call(images, weight, bias, cls_token, mask_token, pos_embed, impl="triton"):
    positions = torch.tensor([[0, 3, -1], [2, 1, 5]], device=DEVICE)
    return embed_patches(
        images,
        weight,
        bias,
        cls_token,
        positions=positions,
        mask_token=mask_token,
        pos_embed=pos_embed,
        impl=impl,
    )


def parameters():
    """weight, bias, cls_token, mask_token, pos_embed for two images of 2 x 3 patches of 4 x 4."""
    return [draw(8, 3, 4, 4), draw(8), draw(8, seed=1), draw(8, seed=2), draw(7, 8)]


IMAGES = draw(2, 3, 8, 12, grad=False)


def test_opcheck() -> None:
    from fastbeit_kernels._embedding import ops

    weight, *others = parameters()
    positions = torch.tensor([[0, 3, -1], [2, 1, 5]], dtype=torch.int32, device=DEVICE)
    opcheck(ops.embed_order, (positions, 6))
    listed = ops.embed_order(positions, 6)
    opcheck(ops.embed_forward, (IMAGES, weight, *others, *listed, torch.float32))
    absent = (IMAGES, weight, None, others[1], None, None, None, None, None, torch.bfloat16)
    opcheck(ops.embed_forward, absent, test_utils=("test_schema", "test_faketensor"))
    wanted = [True, False, True, False, True]
    dout = draw(2, 7, 8, grad=False)
    opcheck(ops.embed_backward, (dout, IMAGES, *listed, 4, 4, torch.float32, wanted))


@pytest.mark.parametrize(
    ("of_weight", "of_cls", "of_mask", "of_pos"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, None),
        (torch.float16, torch.float16, torch.float16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16, torch.float16),
    ],
)
def test_the_dtype_of_the_result_is_the_references(of_weight, of_cls, of_mask, of_pos) -> None:
    weight, bias, cls_token, mask_token, pos_embed = (x.detach() for x in parameters())
    tokens = {
        "cls_token": cls_token.to(of_cls),
        "mask_token": mask_token.to(of_mask),
        "pos_embed": None if of_pos is None else pos_embed.to(of_pos),
    }
    for positions in (torch.zeros(2, 1, dtype=torch.int64, device=DEVICE), None):
        found, expected = (
            embed_patches(
                IMAGES, weight.to(of_weight), bias.half(), **tokens, positions=positions, impl=impl
            )
            for impl in ("triton", "reference")
        )
        assert found.dtype == expected.dtype
        # Projections near 16 that one of the two rounded to bf16 more often.
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-4)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_projects_in_its_dtype_and_leaves_the_tokens(dtype) -> None:
    leaves = parameters()
    mix = draw(2, 7, 8, grad=False)
    with torch.autocast(DEVICE, dtype):
        out, plain = (call(IMAGES, *leaves, impl=impl) for impl in ("triton", "reference"))
    assert out.dtype == plain.dtype == torch.float32
    # What was asked for is exactly the projection of rounded images and weight.
    rounded = [leaves[0].to(dtype), *leaves[1:]]
    assert torch.equal(out, call(IMAGES, *rounded))
    gradients, theirs = (torch.autograd.grad(x, leaves, mix) for x in (out, plain))
    for mine, other in zip(gradients, theirs, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=2**-6, atol=2**-4)
    assert not torch.equal(gradients[0], gradients[0].to(dtype).float()), "rounded to 16 bits"
    assert torch.equal(out[:, 0], (leaves[2] + leaves[4][0]).expand(2, 8)), "CLS was rounded"
    narrow = [leaf.detach().to(dtype) for leaf in leaves]
    with torch.autocast(DEVICE, dtype):
        assert call(IMAGES, *narrow).dtype == call(IMAGES, *narrow, impl="reference").dtype == dtype


# PyTorch's compiler imports deprecated parts of PyTorch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_compiles_into_one_graph() -> None:
    leaves = parameters()

    def model(images, *parameters):
        return call(images.mul(2), *parameters) * 3

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    last = IMAGES.contiguous(memory_format=torch.channels_last)
    for images in (IMAGES, last):
        found, expected = compiled(images, *leaves), model(images, *leaves)
        assert torch.equal(found, expected)
        mix = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad(out, leaves, mix) for out in (found, expected))
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)


def test_checkpointing_gives_the_same_gradients() -> None:
    leaves = parameters()
    plain = torch.autograd.grad(call(IMAGES, *leaves).square().sum(), leaves)
    out = checkpoint(call, IMAGES, *leaves, use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    again = torch.autograd.grad(out.square().sum(), leaves)
    for mine, theirs in zip(again, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_only_what_is_asked_for_gets_a_gradient(monkeypatch) -> None:
    """Frozen parameters are not computed, and the others don't change by a bit."""
    from fastbeit_kernels._embedding import arguments as launches

    leaves = parameters()
    every = torch.autograd.grad(call(IMAGES, *leaves).square().sum(), leaves)
    ran = []

    def spied(name, make):
        def spy(*arguments):
            launch = make(*arguments)
            ran.append((name, launch.grid, [k for k, v in launch.constants.items() if v is True]))
            return launch

        return spy

    of_weight = ["weight_launch", "weight_sum_launch"]
    of_tokens = ["token_sums_launch", "sum_over_tokens_launch"]
    for name in (*of_weight, *of_tokens):
        monkeypatch.setattr(launches, name, spied(name, getattr(launches, name)))
    expected = [of_weight, of_tokens, of_tokens[:1], of_tokens, of_tokens[:1]]
    for chosen, kernels in enumerate(expected):
        ran.clear()
        some = [leaf.detach().requires_grad_(i == chosen) for i, leaf in enumerate(leaves)]
        out = call(IMAGES, *some)
        (gradient,) = torch.autograd.grad(out.square().sum(), some[chosen])
        assert torch.equal(gradient, every[chosen])
        assert [name for name, *_ in ran] == kernels
        if chosen > 0:
            wanted = [None, "DBIAS", "DCLS", "DMASK", "DPOS"][chosen]
            assert ran[0][2] == ["MASKED", wanted]
    ran.clear()
    with torch.no_grad():
        assert call(IMAGES, *leaves).grad_fn is None
    some = [leaf.detach().requires_grad_(i == 2) for i, leaf in enumerate(leaves)]
    torch.autograd.grad(call(IMAGES, *some).sum(), some[2])
    assert [(name, grid) for name, grid, _ in ran] == [("token_sums_launch", 1)], "all tokens' sums"


def test_an_unused_mask_token_has_no_gradient() -> None:
    weight, bias, cls_token, mask_token, _ = parameters()
    for impl in ("triton", "reference"):
        out = embed_patches(IMAGES, weight, bias, cls_token, mask_token=mask_token, impl=impl)
        found = torch.autograd.grad(out.sum(), (cls_token, mask_token), allow_unused=True)
        assert torch.equal(found[0], torch.full_like(cls_token, 2)) and found[1] is None


def test_second_derivatives_are_refused() -> None:
    leaves = parameters()
    out = call(IMAGES, *leaves)
    for leaf in leaves:
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="embed_patches has no second derivative on Triton"):
            gradient.square().sum().backward(retain_graph=True)


def test_what_the_kernels_cannot_do_is_refused_or_left_to_the_reference() -> None:
    leaves = [leaf.detach() for leaf in parameters()]
    images = IMAGES.clone().requires_grad_()
    with pytest.raises(
        ValueError, match="the kernels give images no gradient, and images requires"
    ):
        call(images, *leaves)
    (gradient,) = torch.autograd.grad(call(images, *leaves, impl="auto").square().sum(), images)
    assert gradient.shape == images.shape and gradient.abs().sum() > 0
    names = ("weight", "bias", "cls_token", "mask_token", "pos_embed")
    for place, name in enumerate(names):
        wide = [leaf.double() if i == place else leaf for i, leaf in enumerate(leaves)]
        with pytest.raises(ValueError, match=rf"float32, .*, and {name} is torch\.float64"):
            call(IMAGES, *wide)
        assert call(IMAGES, *wide, impl="auto").shape == (2, 7, 8)
    with pytest.raises(ValueError, match="there is nothing to compute: images is empty"):
        embed_patches(IMAGES[:0], *leaves[:3], impl="triton")
    assert embed_patches(IMAGES[:0], *leaves[:3]).shape == (0, 7, 8)
