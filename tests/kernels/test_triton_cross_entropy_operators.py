"""The masked loss's operators: memory and views, precision, compilation, autograd, refusals."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from masked_loss_problems import (
    DEVICE,
    check,
    choices,
    draw,
    in_dtype,
    integers,
    problem,
    results,
    triton,
)
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastbeit_kernels import masked_linear_cross_entropy

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


def operators():
    from fastbeit_kernels._cross_entropy import ops

    return ops


def same(found, expected) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


def as_view(tensor, kind):
    """The same values in other memory; around floating-point ones NaN, so that an over-read shows;
    around integers 77, which no row or class has."""
    hole = float("nan") if tensor.is_floating_point() else 77
    if kind == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "sliced":
        memory = tensor.new_full([size + 3 for size in tensor.shape], hole)
        view = memory[tuple(slice(2, -1) for _ in tensor.shape)]
    elif kind == "odd offset":
        view = tensor.new_full((tensor.numel() + 3,), hole)[3:].view(tensor.shape)
    else:
        view = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), hole)[..., ::2]
    return view.copy_(tensor)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "odd offset", "every second element"])
def test_views(kind) -> None:
    """Any strides, of any argument: the same bits."""
    tensors, positions, targets = problem(2, 9, 5, 24, 21)
    with choices(whole_row=0 if kind == "odd offset" else 256):
        expected, counts = results(triton, tensors, positions, targets)
        viewed = [as_view(x, kind) for x in tensors]
        found, again = results(triton, viewed, as_view(positions, kind), as_view(targets, kind))
    assert again == counts
    # The product may be another of the library's for a weight that lies transposed.
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    if kind != "transposed":
        same(found, expected)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_integers_of_any_width(integer) -> None:
    tensors, positions, targets = problem(2, 9, 5, 8, 21)
    positions, targets = positions.clamp(min=0), targets.clamp(min=0)
    expected, counts = results(triton, tensors, positions, targets)
    found, again = results(triton, tensors, positions.to(integer), targets.to(integer))
    assert again == counts
    same(found, expected)


def test_nothing_unwritten_is_read_and_everything_is_written(monkeypatch) -> None:
    """Fresh memory full of NaN, or of numbers that are no row and no class, gives the same bits."""
    cases = [problem(2, 9, 5, 24, 21), problem(2, 3, None, 4, 130)]

    def run():
        found = []
        for whole_row in (0, 256):
            with choices(whole_row=whole_row):
                found += [results(triton, *case, 0.1) for case in cases]
        return found

    expected = run()
    made = []

    def poisoned(function):
        def make(*args, **kwargs):
            tensor = function(*args, **kwargs)
            made.append(tensor)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30 + 1)

        return make

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    for (found, counts), (before, same_counts) in zip(run(), expected, strict=True):
        assert counts == same_counts
        same(found, before)
    assert len(made) > 40


def test_two_runs_are_equal_bit_by_bit_and_so_are_two_backwards() -> None:
    leaves, positions, targets = problem(3, 9, 7, 24, 40)
    hidden, weight, bias = (x.requires_grad_() for x in leaves)
    first = triton(hidden, positions, weight, bias, targets)
    second = triton(hidden, positions, weight, bias, targets)
    same(second, first)
    gradients = torch.autograd.grad(first.loss, leaves, retain_graph=True)
    same(torch.autograd.grad(first.loss, leaves), gradients)
    same(torch.autograd.grad(second.loss, leaves), gradients)


@pytest.mark.parametrize("whole_row", [0, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, whole_row) -> None:
    """Against float64 of the same 16-bit inputs: at most twice plain PyTorch's error. (No product
    is interpreted: they are PyTorch's, so the bound holds without a GPU too.)"""
    tensors, positions, targets = problem(2, 20, 15, 64, 200)
    with choices(whole_row=whole_row):
        ours, _ = check(in_dtype(tensors, dtype), positions, targets, 0.1)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype, dtype]


def test_fp16_sums_neither_overflow_nor_vanish() -> None:
    """A sum over rows is beyond fp16's 65,504 before it is divided by their number. And the mean's
    gradient is below fp16's smallest number, 2**-24, but not after loss scaling."""
    rows = 16
    hidden = torch.full((1, rows, 2), 30_000.0, device=DEVICE, dtype=torch.float16)
    weight = torch.zeros(2, 2, device=DEVICE, dtype=torch.float16)
    targets = torch.zeros(1, rows, dtype=torch.int64, device=DEVICE)
    found, _ = results(triton, [hidden, weight, None], None, targets)
    assert found[2].tolist() == [[-15_000.0] * 2, [15_000.0] * 2]
    weight[1] = 2.0**-20
    found, _ = results(triton, [torch.zeros_like(hidden), weight, None], None, targets)
    assert (found[1] == 0).all() and 0.5 * 2.0**-20 / rows < 2.0**-24
    scaled, _ = results(
        triton, [torch.zeros_like(hidden), weight, None], None, targets, dloss=2.0**16
    )
    assert (scaled[1] == 0.5 * 2.0**-20 / rows * 2.0**16).all()


def test_autocast_casts_as_a_linear_layer_does() -> None:
    (hidden, weight, bias), positions, targets = problem(2, 9, 5, 24, 40)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def run(impl):
        with torch.autocast(DEVICE, torch.bfloat16):
            out = masked_linear_cross_entropy(hidden, positions, weight, bias, targets, impl=impl)
            # Inside too: nothing of the backward may be cast once more.
            return [out.loss, *torch.autograd.grad(out.loss, leaves)]

    ours, theirs = run("triton"), run("reference")
    halves = [x.detach().bfloat16().requires_grad_() for x in leaves]
    loss = triton(halves[0], positions, halves[1], halves[2], targets).loss
    expected = torch.autograd.grad(loss, halves)
    assert torch.equal(ours[0], loss)
    same(ours[1:], [x.float() for x in expected])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=0.05, atol=1e-3)


def test_opcheck() -> None:
    ops = operators()
    (hidden, weight, bias), positions, targets = problem(2, 9, 5, 8, 21)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    opcheck(
        ops.masked_loss_forward,
        (leaves[0], positions, leaves[1], leaves[2], targets, 0.1, True, True, True),
    )
    frozen = [x.detach() for x in leaves]
    opcheck(
        ops.masked_loss_forward,
        (frozen[0], positions, frozen[1], frozen[2], targets, 0.0, False, False, False),
        test_utils=("test_schema", "test_faketensor"),
    )


# PyTorch's compiler imports deprecated parts of PyTorch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend) -> None:
    (hidden, weight, bias), positions, targets = problem(2, 9, 5, 8, 21)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def model(hidden, weight, bias):
        # An intermediate value: whether a gradient is wanted is known to the compiler alone.
        out = triton(hidden * 2, positions, weight, bias, targets, label_smoothing=0.1)
        return out.loss * 3, out.correct, out.count

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected, found = model(*leaves), compiled(*leaves)
    same(found, expected)
    same(torch.autograd.grad(found[0], leaves), torch.autograd.grad(expected[0], leaves))
    with torch.no_grad():
        same(compiled(*leaves), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant) -> None:
    (hidden, weight, bias), positions, targets = problem(2, 9, 5, 8, 21)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def head(hidden, weight, bias):
        return triton(hidden * 2, positions, weight, bias, targets).loss

    expected = torch.autograd.grad(head(*leaves), leaves)
    loss = checkpoint(head, *leaves, use_reentrant=reentrant)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    same([x.grad for x in leaves], expected)


@pytest.mark.parametrize("whole_row", [0, 256])
def test_only_what_is_asked_for_is_computed(whole_row) -> None:
    """The same bits whatever else is asked for; and nothing is kept that nobody needs."""
    tensors, positions, targets = problem(2, 9, 5, 8, 21)
    with choices(whole_row=whole_row):
        full, _ = results(triton, tensors, positions, targets)
        for wanted in ((0,), (1,), (2,), (0, 2)):
            leaves = [x.clone().requires_grad_(n in wanted) for n, x in enumerate(tensors)]
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
            ):
                loss = triton(leaves[0], positions, leaves[1], leaves[2], targets).loss
            found = torch.autograd.grad(loss, [leaves[n] for n in wanted])
            same(found, [full[1 + n] for n in wanted])
            # 24 floats a row of logits.
            assert (10 * 24 in kept) == (wanted != (2,)), wanted
            assert (10 * 8 in kept) == (1 in wanted), wanted
        seen = []
        forward = operators().run_forward
        with mock.patch.object(
            operators(), "run_forward", lambda *a: seen.append(a) or forward(*a)
        ):
            leaves = [x.clone().requires_grad_() for x in tensors]
            with torch.no_grad():
                quiet = triton(leaves[0], positions, leaves[1], leaves[2], targets)
            assert quiet.loss.grad_fn is None and seen[0][-1] == (False, False, False)
        assert torch.equal(quiet.loss, full[0])


def test_counts_and_what_the_operator_keeps_need_no_gradient() -> None:
    (hidden, weight, bias), positions, targets = problem(2, 9, 5, 8, 21)
    out = triton(hidden.requires_grad_(), positions, weight, bias, targets)
    assert out.loss.requires_grad and not out.correct.requires_grad and not out.count.requires_grad
    found = operators().masked_loss_forward(
        hidden, positions, weight, bias, targets, 0.0, True, False, False
    )
    assert [x.requires_grad for x in found] == [True] + [False] * 6


def test_second_derivatives_are_refused() -> None:
    (hidden, weight, bias), positions, targets = problem(2, 9, 5, 8, 21)
    loss = triton(hidden.requires_grad_(), positions, weight, bias, targets).loss
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_linear_cross_entropy has no second derivative"):
        gradient.square().sum().backward()


def test_what_the_kernels_cannot_do_is_refused_or_left_to_the_reference() -> None:
    targets = integers(0, 5, (2, 3), 1)
    double = (draw(2, 3, 4, seed=1).double(), None, draw(5, 4, seed=2).double(), None, targets)
    many = (draw(1, 2, 1, seed=1), None, draw(65_537, 1, seed=2), None, targets[:1, :2])
    empty = (draw(2, 0, 4, seed=1), None, draw(5, 4, seed=2), None, targets[:, :0])
    no_slots = (draw(2, 3, 4, seed=1), targets[:, :0], draw(5, 4, seed=2), None, targets[:, :0])
    for arguments, message in (
        (double, "float32, float16 and bfloat16, and hidden is torch.float64"),
        (many, "up to 65536 classes, and weight has 65537"),
        (empty, "there is nothing to compute: hidden is empty"),
        (no_slots, "there is nothing to compute: targets is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            masked_linear_cross_entropy(*arguments, impl="triton")
        out = masked_linear_cross_entropy(*arguments)
        assert out.count.item() == arguments[-1].numel() and out.loss.isfinite()


def test_mixed_dtypes_are_refused_in_words_but_not_under_autocast() -> None:
    (hidden, weight, bias), positions, targets = problem(2, 9, 5, 8, 21)
    for impl in ("triton", "reference"):
        for mixed in ((hidden.bfloat16(), weight, bias), (hidden, weight, bias.half())):
            case = (mixed[0], positions, mixed[1], mixed[2], targets)
            with pytest.raises(ValueError, match="hidden, weight, bias must have one dtype, got"):
                masked_linear_cross_entropy(*case, impl=impl)
            with torch.autocast(DEVICE, torch.bfloat16):
                assert masked_linear_cross_entropy(*case, impl=impl).loss.isfinite()
        with pytest.raises(ValueError, match=r"weight must have one dtype, got .*bfloat16"):
            masked_linear_cross_entropy(
                hidden, positions, weight.bfloat16(), None, targets, impl=impl
            )
