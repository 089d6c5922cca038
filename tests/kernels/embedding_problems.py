"""What the tests of the Triton patch embedding share: problems, results, and the measure.

The measure is plain PyTorch's own error against float64 at the same precision: the kernels' may be
at most twice as large, norm-wise, plus one rounding of the result (a short sum may be exact by
luck).
"""

from __future__ import annotations

import torch

from fastbeit_kernels import embed_patches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARAMETERS = ("weight", "bias", "cls_token", "mask_token", "pos_embed")


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def problem(batch=2, channels=3, grid=(3, 4), patch=(4, 4), width=20, slots=5, seed=0, **absent):
    """Arguments of embed_patches, and dout. slots: of positions, some empty, some repeated."""
    tokens = grid[0] * grid[1] + 1
    arguments = {
        "images": draw(batch, channels, grid[0] * patch[0], grid[1] * patch[1], seed=seed),
        "weight": draw(width, channels, *patch, seed=seed + 1),
        "bias": draw(width, seed=seed + 2),
        "cls_token": draw(width, seed=seed + 3),
        "positions": None,
        "mask_token": None,
        "pos_embed": draw(tokens, width, seed=seed + 5),
    }
    if slots is not None:
        generator = torch.Generator().manual_seed(seed)
        positions = torch.randint(-1, tokens - 1, (batch, slots), generator=generator)
        arguments["positions"] = positions.to(DEVICE)
        arguments["mask_token"] = draw(width, seed=seed + 4)
    return {**arguments, **absent}, draw(batch, tokens, width, seed=seed + 6)


def results(arguments, dout, impl="triton"):
    """{"out": ..., "weight": its gradient, ...} for every parameter that is there."""
    leaves = {
        name: arguments[name].detach().requires_grad_()
        for name in PARAMETERS
        if arguments[name] is not None
    }
    out = embed_patches(**{**arguments, **leaves}, impl=impl)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def in_dtype(arguments, dtype):
    def cast(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {name: cast(x) for name, x in arguments.items()}


def distance(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def check(arguments, dout):
    """The kernels' fp32 results, having compared them."""
    ours, plain = results(arguments, dout), results(arguments, dout, "reference")
    truth = results(in_dtype(arguments, torch.float64), dout, "reference")
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        assert ours[name].shape == exact.shape and ours[name].dtype == torch.float32
        allowed = 2 * distance(plain[name], exact) + torch.finfo(torch.float32).eps
        assert distance(ours[name], exact) <= allowed, name
    return ours


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, mine in found.items():
        assert torch.equal(mine, expected[name]), name
