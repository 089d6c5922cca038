"""The Triton kernels of residual and LayerNorm against float64: values and every gradient.

Without a GPU they are interpreted; with one they run on it. The measure is plain PyTorch's own
error at the same precision: the kernels' may be at most twice as large, norm-wise, plus one
rounding of the result (a short sum may be exact by luck).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbeit_kernels import scale_residual, scale_residual_layer_norm

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3  # large enough to be missed
U = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def problem(batch, tokens, width, *, without=(), seed=0):
    """x, branch, gamma, weight, bias by name (or None), DropPath's factors, (dy, dnormed)."""
    rows, vector = (batch, tokens, width), (width,)
    shapes = {"x": rows, "branch": rows, "gamma": vector, "weight": vector, "bias": vector}
    tensors = {
        name: None if name in without else draw(*shape, seed=seed + place)
        for place, (name, shape) in enumerate(shapes.items())
    }
    # Another factor for each image, zero among them.
    drop = None if "drop" in without else torch.arange(batch, device=DEVICE) * 1.25
    return tensors, drop, (draw(*rows, seed=seed + 5), draw(*rows, seed=seed + 6))


def results(impl, tensors, drop, gradients):
    """y, normed and the gradients by name. Without a weight there is no norm; a gradient of None
    stands for a result that is not used."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if x is not None}
    optional = {"gamma": leaves.get("gamma"), "drop_scale": drop, "impl": impl}
    if "weight" in leaves:
        norm = {"weight": leaves["weight"], "bias": leaves.get("bias"), "eps": EPS}
        found = scale_residual_layer_norm(leaves["x"], leaves.get("branch"), **norm, **optional)
    else:
        found = (scale_residual(leaves["x"], leaves["branch"], **optional),)
    used = [(out, grad) for out, grad in zip(found, gradients, strict=False) if grad is not None]
    back = torch.autograd.grad(
        [out for out, _ in used],
        list(leaves.values()),
        [grad.to(out.dtype) for out, grad in used],
        allow_unused=True,
    )
    named = dict(zip(("y", "normed"), (out.detach() for out in found), strict=False))
    return named | {f"d{name}": grad for name, grad in zip(leaves, back, strict=True)}


def in_double(tensors, drop):
    return {n: None if x is None else x.double() for n, x in tensors.items()}, (
        None if drop is None else drop.double()
    )


def distance(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def check(tensors, drop, gradients):
    """The kernels' fp32 results, having compared them."""
    ours = results("triton", tensors, drop, gradients)
    plain = results("reference", tensors, drop, gradients)
    truth = results("reference", *in_double(tensors, drop), gradients)
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        if exact is None:
            assert ours[name] is None, name
            continue
        mine = ours[name]
        assert mine.shape == exact.shape and mine.dtype == torch.float32, name
        allowed = 2 * distance(plain[name], exact) + 2 * U[torch.float32]
        assert distance(mine, exact) <= allowed, name
    return ours


@pytest.mark.parametrize(
    ("batch", "tokens", "width", "without"),
    [
        pytest.param(1, 9, 768, (), id="BEiT-B's width"),
        pytest.param(1, 5, 768, ("branch", "gamma", "drop"), id="BEiT-B's first norm"),
        pytest.param(1, 5, 1024, (), id="BEiT-L's width"),
        pytest.param(2, 197, 96, (), id="197 tokens"),
        pytest.param(1, 3, 1280, ("gamma",), id="three pieces, the last half empty"),
        pytest.param(2, 9, 192, ("drop", "bias"), id="four rows a warp"),
        pytest.param(2, 7, 197, (), id="an odd width"),
        pytest.param(3, 5, 33, ("weight", "bias"), id="the residual alone"),
        pytest.param(2, 3, 40, ("gamma", "drop"), id="a branch without factors"),
        pytest.param(2, 3, 40, ("gamma", "drop", "weight", "bias"), id="a mere sum"),
        pytest.param(1, 1, 1, (), id="one number, whose norm is the bias"),
        pytest.param(1, 2, 8192, ("gamma", "bias"), id="the widest"),
        pytest.param(1, 2, 6145, ("branch", "gamma", "drop", "bias"), id="wide, odd, norm alone"),
    ],
)
def test_values_and_gradients(batch, tokens, width, without) -> None:
    check(*problem(batch, tokens, width, without=without))


OPTIONAL = ("branch", "gamma", "drop", "bias", "weight")


@settings(max_examples=12)
@given(data=st.data())
def test_any_shape_and_any_pieces(data) -> None:
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    width = data.draw(st.integers(1, 300))
    without = {name for name in OPTIONAL if data.draw(st.booleans())}
    if "branch" in without:
        without = without - {"weight"} | {"gamma", "drop"}
    if "weight" in without:
        without |= {"bias"}
    tensors, drop, (dy, dnormed) = problem(batch, tokens, width, without=without, seed=width)
    used = data.draw(st.sampled_from(("both", "y", "normed")))
    if "weight" in without or used == "y":
        dnormed = None
    elif used == "normed":
        dy = None
    check(tensors, drop, (dy, dnormed))


def test_a_large_mean_costs_no_variance() -> None:
    """Of rows 1000 +- 1, a difference of two large sums would keep one digit of the variance."""
    tensors, drop, gradients = problem(2, 5, 96, without=("branch", "gamma", "drop"))
    tensors["x"] += 1000
    check(tensors, drop, gradients)


@pytest.mark.parametrize("family", ["sm_80", "sm_86", "sm_90", "sm_100"])
def test_every_launch_choice_computes_the_same(family, monkeypatch) -> None:
    """Several tiles a program, in uneven shares, and several rounds of sums: 23 rows are 6 tiles of
    4, 41 are 11, on 4 programs."""
    from fastbeit_kernels._layer_norm import arguments, configs

    config = dataclasses.replace(configs.layer_norm_config(family), programs=4)
    monkeypatch.setattr(arguments, "layer_norm_config", lambda *_: config)
    monkeypatch.setattr(arguments, "SUM_PROGRAMS", 2)
    check(*problem(1, 23, 128))
    check(*problem(1, 41, 128, without=("gamma",)))


def test_row_tiles_hold_every_row_and_waste_little() -> None:
    from fastbeit_kernels._api.layer_norm import KERNEL_ROW_WIDTH
    from fastbeit_kernels._layer_norm.configs import BACKWARD, FORWARD, RowTile, row_tile

    assert row_tile(768, 2, FORWARD) == RowTile(rows=4, columns=256, pieces=3, warps=4)
    assert row_tile(768, 4, BACKWARD) == RowTile(rows=4, columns=128, pieces=6, warps=4)
    for width in (*range(1, KERNEL_ROW_WIDTH, 61), KERNEL_ROW_WIDTH):
        for element_bytes in (2, 4):
            for rows in (FORWARD, BACKWARD):
                tile = row_tile(width, element_bytes, rows)
                held = tile.columns * tile.pieces
                assert width <= held and held - width < tile.columns
                assert held <= max(1.5 * width, 16 // element_bytes)
                assert tile.rows * tile.columns == tile.warps * 32 * (16 // element_bytes)
                assert held * tile.rows // (32 * tile.warps) <= rows.elements
                assert tile.warps <= 16


def as_views(tensor, kind):
    """The same values in other memory; around them NaN, so that an over-read shows."""
    batch, tokens, width = tensor.shape
    if kind == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "sliced":
        memory = tensor.new_full((batch + 2, tokens + 3, width + 8), float("nan"))
        view = memory[1:-1, 2:-1, 8:]
    elif kind == "odd offset":
        view = tensor.new_full((tensor.numel() + 3,), float("nan"))[3:].view(tensor.shape)
    else:
        view = tensor.new_full((batch, tokens, 2 * width), float("nan"))[..., ::2]
    return view.copy_(tensor)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "odd offset", "every second element"])
@pytest.mark.parametrize("without", [(), ("branch", "gamma", "drop")])
def test_views(kind, without) -> None:
    tensors, drop, gradients = problem(3, 7, 40, without=without)
    expected = results("triton", tensors, drop, gradients)
    viewed = {
        name: None if x is None else as_views(x if x.dim() == 3 else x[None, None], kind)
        for name, x in tensors.items()
    }
    viewed = {n: x if n in ("x", "branch") or x is None else x[0, 0] for n, x in viewed.items()}
    if drop is not None:
        drop = as_views(drop[None, None], kind)[0, 0]
    found = results("triton", viewed, drop, [as_views(grad, kind) for grad in gradients])
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert found["normed"].is_contiguous()


def test_one_gradient_for_all_rows_and_one_row_for_all_images() -> None:
    """Expanded tensors, whose strides are zero."""
    tensors, drop, (dy, dnormed) = problem(3, 5, 40)
    tensors["branch"] = tensors["branch"][:1].expand(3, 5, 40)
    check(tensors, drop, (dy[..., :1].expand(3, 5, 40), dnormed[:1, :1].expand(3, 5, 40)))


def test_distances_beyond_32_bits() -> None:
    """Tokens 2**30 elements apart: three of them reach past 2**31. Little of the memory is used."""
    memory = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=DEVICE)
    x = memory.as_strided((1, 3, 8), (8, 2**30, 1))
    x.copy_(draw(1, 3, 8, seed=1))
    weight, branch = torch.ones(8, device=DEVICE), draw(1, 3, 8, seed=2)
    found = scale_residual_layer_norm(x, branch, weight=weight, bias=None, impl="triton")
    near = scale_residual_layer_norm(x.clone(), branch, weight=weight, bias=None, impl="triton")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, near, strict=True))


def test_nothing_unwritten_is_read_and_everything_is_written(monkeypatch) -> None:
    """Fresh memory full of NaN gives the same bits."""
    from fastbeit_kernels._layer_norm import run

    cases = [
        problem(2, 9, 100),
        problem(2, 3, 1100, without=("branch", "gamma", "drop")),
        problem(1, 5, 24, without=("weight", "bias")),
    ]
    expected = [results("triton", *case) for case in cases]
    made = []
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made.append(empty(*args, **kwargs))
        return made[-1].fill_(float("nan"))

    monkeypatch.setattr(run.torch, "empty", poisoned)
    found = [results("triton", *case) for case in cases]
    # y, normed, mean, rstd, five gradients and the shares of three; without a branch 3 + 3 + 1;
    # without a norm y, dbranch, dgamma and its shares.
    assert len(made) == 10 + 7 + 4
    for mine, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            assert torch.equal(mine[name], value), name


def test_the_same_bits_in_every_run_and_in_every_batch() -> None:
    """Rows depend on nothing but themselves; sums over rows have one order."""
    case = problem(3, 29, 72)
    tensors, drop, gradients = case
    once, again = results("triton", *case), results("triton", *case)
    assert all(torch.equal(value, again[name]) for name, value in once.items())
    second = slice(1, 2)
    alone = {n: x[second] if n in ("x", "branch") else x for n, x in tensors.items()}
    single = results("triton", alone, drop[second], [grad[second] for grad in gradients])
    for name in ("y", "normed", "dx", "dbranch"):
        assert torch.equal(once[name][second], single[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_the_rounded_sum(dtype) -> None:
    """Bit for bit what the norm alone makes of y, and y what the residual alone makes of x."""
    tensors, drop, gradients = problem(2, 9, 72)
    tensors = {n: x.to(dtype) if n in ("x", "branch") else x for n, x in tensors.items()}
    together = results("triton", tensors, drop, gradients)
    residual = tensors | {"weight": None, "bias": None}
    assert torch.equal(together["y"], results("triton", residual, drop, gradients)["y"])
    norm = tensors | {"x": together["y"], "branch": None, "gamma": None}
    alone = results("triton", norm, None, gradients)
    for name in ("normed", "dweight", "dbias"):
        assert torch.equal(together[name], alone[name]), name


MIXED = [
    # stream, branch, gamma, weight and bias
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize("dtypes", MIXED)
@pytest.mark.parametrize("without", [(), ("gamma", "drop", "bias"), ("branch", "gamma", "drop")])
def test_dtypes(dtypes, without) -> None:
    """Each result is off by its own rounding (at most u, norm-wise; the interpreter cuts bf16 off,
    which is 2 u) and by fp32 sums of 21 rows of 48 elements. The truth norms the y that was stored,
    and its gradient passes through the rounding."""
    tensors, drop, gradients = problem(3, 7, 48, without=without)
    stream, branch, gamma, norm = dtypes
    wanted = {"x": stream, "branch": branch, "gamma": gamma, "weight": norm, "bias": norm}
    tensors = {n: None if x is None else x.to(wanted[n]) for n, x in tensors.items()}
    gradients = [grad.to(stream) for grad in gradients]
    ours = results("triton", tensors, drop, gradients)
    doubles, double_drop = in_double(tensors, drop)
    exact_y = results("reference", doubles, double_drop, gradients)["y"]
    # The same gradients, at the stored y: x is what makes it so.
    doubles["x"] = doubles["x"] + ours["y"].double() - exact_y
    truth = results("reference", doubles, double_drop, gradients) | {"y": exact_y}
    types = {"y": stream, "normed": stream} | {f"d{n}": dtype for n, dtype in wanted.items()}
    for name, exact in truth.items():
        assert ours[name].dtype == types[name], name
        cut = 2 if types[name] == torch.bfloat16 and DEVICE == "cpu" else 1
        assert distance(ours[name], exact) <= cut * U[types[name]] + 16 * U[torch.float32], name
