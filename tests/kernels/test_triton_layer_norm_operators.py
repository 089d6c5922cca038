"""The registered operators of residual and LayerNorm: compilation, autocast, checkpoints, what is
kept and computed for a backward pass, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastbeit_kernels import scale_residual, scale_residual_layer_norm

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "branch", "weight", "bias", "gamma")


def draw(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_(grad)


def problem(dtype=torch.float32):
    """x, branch, weight, bias, gamma and DropPath's factors."""
    rows = [draw(2, 3, 24, seed=seed).detach().to(dtype).requires_grad_() for seed in (1, 2)]
    factors = torch.tensor([[0.0, 9.0], [1.25, 9.0]], device=DEVICE)
    return [*rows, *(draw(24, seed=seed) for seed in (3, 4, 5))], factors[:, 0]


def whole(x, branch, weight, bias, gamma, drop):
    return scale_residual_layer_norm(
        x, branch, weight=weight, bias=bias, gamma=gamma, drop_scale=drop, impl="triton"
    )


def test_opcheck() -> None:
    from fastbeit_kernels._layer_norm import ops

    (x, branch, weight, bias, gamma), drop = problem()
    opcheck(ops.residual_norm_forward, (x, branch, weight, bias, 1e-6, gamma, drop))
    opcheck(ops.residual_norm_forward, (x.detach(), branch, weight, None, 1e-6, None, None))
    transposed = x.detach().transpose(0, 1).requires_grad_()
    opcheck(ops.norm_forward, (transposed, weight, bias, 1e-6))
    opcheck(ops.residual_forward, (x, branch, gamma, drop))
    opcheck(ops.residual_forward, (x, branch, None, None))


def blocks(x, branch, weight, bias, gamma, drop):
    """As in a model: a norm alone, residuals with and without factors, one with no norm behind."""
    _, normed = whole(x, None, weight, bias, None, None)
    y, normed = whole(x, branch * normed, weight, bias, gamma, drop)
    y, normed = whole(y, normed * 2, weight, bias, None, None)
    return scale_residual(y, normed, gamma=gamma, drop_scale=drop, impl="triton")


# PyTorch's compiler imports deprecated parts of PyTorch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend) -> None:
    inputs, drop = problem()
    compiled = torch.compile(blocks, fullgraph=True, backend=backend)
    expected, found = blocks(*inputs, drop), compiled(*inputs, drop)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights)
    )


def test_automatic_choice_compiles_too() -> None:
    (x, branch, weight, _, _), drop = problem()

    def model(x, branch):
        return scale_residual_layer_norm(x, branch, weight=weight, bias=None, drop_scale=drop)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, branch), model(x, branch))


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(stream) -> None:
    """PyTorch's own norm would come back in fp32 on a GPU."""
    inputs, drop = problem(stream)
    plain = whole(*inputs, drop)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = whole(*inputs, drop)
        alone = whole(inputs[0], None, *inputs[2:4], None, None)
    assert alone[0] is inputs[0] and alone[1].dtype == stream
    assert all(out.dtype == stream for out in found)
    gradients = torch.autograd.grad([out.float().sum() for out in found], inputs)
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
    expected = torch.autograd.grad([out.float().sum() for out in plain], inputs)
    for mine, theirs in zip((*found, *gradients), (*plain, *expected), strict=True):
        assert torch.equal(mine, theirs)


def test_checkpointing_gives_the_same_gradients() -> None:
    inputs, drop = problem()
    plain = torch.autograd.grad(blocks(*inputs, drop).square().sum(), inputs)
    out = checkpoint(blocks, *inputs, drop, use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    again = torch.autograd.grad(out.square().sum(), inputs)
    for mine, theirs in zip(again, plain, strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture
def launched(monkeypatch):
    """Constants of every backward launch."""
    from fastbeit_kernels._layer_norm import arguments

    found, launch = [], arguments.backward_launch

    def spy(*args):
        made = launch(*args)
        found.append(made.constants)
        return made

    monkeypatch.setattr(arguments, "backward_launch", spy)
    return found


@pytest.mark.parametrize("learning", NAMES)
def test_only_what_is_asked_for_is_computed(learning, launched) -> None:
    inputs, drop = problem()
    outputs = whole(*inputs, drop)
    together = torch.autograd.grad([out.square().sum() for out in outputs], inputs)
    place = NAMES.index(learning)
    leaf = inputs[place]
    outputs = whole(*(t if t is leaf else t.detach() for t in inputs), drop)
    (alone,) = torch.autograd.grad([out.square().sum() for out in outputs], leaf)
    assert torch.equal(alone, together[place])
    flags = ("DX", "DBRANCH", "DWEIGHT", "DBIAS", "DGAMMA")
    assert [launched[0][flag] for flag in flags] == [True] * 5
    assert [flag for flag in flags if launched[1][flag]] == [flags[place]]


def test_a_result_that_is_not_used_costs_nothing(launched) -> None:
    """Its gradient is absent, not a tensor of zeros."""
    inputs, drop = problem()
    y, normed = whole(*inputs, drop)
    torch.autograd.grad(normed.sum(), inputs, retain_graph=True)
    torch.autograd.grad(y.sum(), inputs, allow_unused=True)
    assert [(c["DY"], c["NORM"], c["DX"]) for c in launched] == [
        (False, True, True),
        (True, False, False),
    ]


def test_the_branch_is_kept_for_gamma_alone() -> None:
    (x, branch, weight, bias, gamma), drop = problem()

    def kept(call):
        found = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.append(t) or t, lambda t: t
        )
        with hooks:
            call()
        return any(t.data_ptr() == branch.data_ptr() for t in found)

    for factor in (gamma, gamma.detach()):
        assert (
            kept(lambda g=factor: whole(x, branch, weight, bias, g, drop)) == factor.requires_grad
        )
        call = lambda g=factor: scale_residual(x, branch, gamma=g, impl="triton")  # noqa: E731
        assert kept(call) == factor.requires_grad


def test_without_factors_one_gradient_serves_both(launched) -> None:
    """dbranch is dx: written once where the dtypes agree, and in its own dtype where they don't."""
    (x, branch, weight, bias, _), _ = problem()
    half = branch.detach().bfloat16().requires_grad_()
    for other, written in ((branch, False), (half, True)):
        _, normed = whole(x, other, weight, bias, None, None)
        dx, dbranch = torch.autograd.grad(normed.square().sum(), (x, other))
        assert launched[-1]["DBRANCH"] == written
        assert dbranch.dtype == other.dtype
        torch.testing.assert_close(dbranch.float(), dx, rtol=2**-7, atol=0)
    y, _ = whole(x.detach(), branch, weight, bias, None, None)
    (alone,) = torch.autograd.grad(y.sum(), branch)
    assert (alone == 1).all() and len(launched) == 2, "y's gradient took a kernel"


def test_second_derivatives_are_refused() -> None:
    (x, branch, weight, bias, gamma), drop = problem()
    for out, leaf in (
        (whole(x, branch, weight, bias, gamma, drop)[1], x),
        (whole(x, None, weight, bias, None, None)[1], x),
        (scale_residual(x, branch, gamma=gamma, drop_scale=drop, impl="triton"), gamma),
    ):
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="scale_residual_layer_norm has no second"):
            gradient.square().sum().backward()


def test_without_gradients_nothing_is_recorded() -> None:
    inputs, drop = problem()
    with torch.no_grad():
        assert all(out.grad_fn is None for out in whole(*inputs, drop))


def test_what_the_kernels_cannot_do_is_refused_or_left_to_the_reference() -> None:
    (x, branch, weight, bias, gamma), drop = problem()
    wide, ones = draw(1, 1, 8193), torch.ones(8193, device=DEVICE)
    learning = drop.clone().requires_grad_()
    for message, call in (
        (
            r"rows of up to 8192 elements, and x's have 8193",
            lambda impl: scale_residual_layer_norm(wide, weight=ones, bias=None, impl=impl)[1],
        ),
        (
            "give drop_scale no gradient, and drop_scale requires one",
            lambda impl: scale_residual_layer_norm(
                x, branch, weight=weight, bias=bias, drop_scale=learning, impl=impl
            )[1],
        ),
        (
            "give drop_scale no gradient",
            lambda impl: scale_residual(x, branch, drop_scale=learning, impl=impl),
        ),
        (
            r"and drop_scale is torch\.float64",
            lambda impl: scale_residual(x, branch, drop_scale=drop.double(), impl=impl),
        ),
        (
            r"and gamma is torch\.float64",
            lambda impl: scale_residual(x, branch, gamma=gamma.double(), impl=impl),
        ),
        (
            "there is nothing to compute: x is empty",
            lambda impl: scale_residual(x[:0], branch[:0], impl=impl),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call("triton")
        assert torch.equal(call("auto"), call("reference"))
    out = scale_residual(x, branch, drop_scale=learning)
    assert torch.autograd.grad(out.sum(), learning)[0].abs().min() > 0


def test_counted_traffic_of_training() -> None:
    """BEiT-B, batch 128, bf16: x, branch, y, normed; backward dy, dnormed, y, branch, dx, dbranch
    and the shares of 264 programs. At the 3 TB/s of an H100 52 and 78 us."""
    from fastbeit_kernels._launches.layer_norm import BASE, layer_norm_records

    rows, width = 128 * 197, 768
    records = layer_norm_records("sm_90", BASE, torch.bfloat16, residual=True, norm=True)
    forward, backward, total = records
    numbers, shares = 2 * rows * 4, 264 * 3 * width * 4
    assert forward.hbm_bytes == 4 * rows * width * 2 + numbers + 3 * width * 4
    assert backward.hbm_bytes == 6 * rows * width * 2 + numbers + shares + 2 * width * 4
    assert total.hbm_bytes == shares + 3 * width * 4
    limits_us = [record.hbm_bytes / 3e6 for record in (forward, backward)]
    assert [round(limit) for limit in limits_us] == [52, 78]
    assert backward.launch.grid == 264 and backward.launch.constants["STAGES"] == 3
