"""linear_argmax in Triton: which class wins, at ties, NaN, tile borders, in any memory and dtype.

Small integers are multiplied and added without rounding in any dtype, and tie by the dozen, so with
them the answer must be exactly the exact scores' argmax.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fastbeit_kernels import linear_argmax

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE)


def integers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-2, 3, shape, generator=generator).float().to(DEVICE)


def ours(x, weight, bias=None):
    codes = linear_argmax(x, weight, bias, impl="triton")
    assert codes.dtype == torch.int64 and codes.shape == x.shape[:1]
    return codes


def exact_scores(x, weight, bias=None):
    scores = x.double() @ weight.double().T
    return scores if bias is None else scores + bias.double()


def check_exactly(x, weight, bias=None):
    assert torch.equal(ours(x, weight, bias), exact_scores(x, weight, bias).argmax(-1))


@pytest.mark.parametrize(
    ("rows", "depth", "classes", "bias"),
    [
        pytest.param(6, 32, 8192, True, id="the tokenizer's 8192 codes"),
        pytest.param(130, 96, 1000, True, id="ImageNet's classes; two row tiles, the last of two"),
        pytest.param(3, 2048, 10, False, id="ten classes, the tokenizer's width"),
        pytest.param(128, 64, 256, True, id="one whole tile"),
        pytest.param(5, 21, 257, True, id="a depth of no multiple of 8, a tile and one class"),
        pytest.param(1, 1, 1, False, id="one of everything"),
    ],
)
def test_ties_go_to_the_lowest_index(rows, depth, classes, bias) -> None:
    x, weight = integers(rows, depth), integers(classes, depth, seed=1)
    check_exactly(x, weight, integers(classes) if bias else None)


@settings(max_examples=6)
@given(st.integers(1, 150), st.integers(1, 80), st.integers(1, 600), st.booleans())
def test_any_shape(rows, depth, classes, bias) -> None:
    x, weight = integers(rows, depth), integers(classes, depth, seed=1)
    check_exactly(x, weight, integers(classes) if bias else None)


@pytest.mark.parametrize(("rows", "depth", "classes"), [(60, 96, 1000), (9, 203, 700)])
def test_fp32_scores_are_as_exact_as_plain_fp32(rows, depth, classes) -> None:
    """What was chosen may be beaten by no more than two scores are off together."""
    x, weight, bias = draw(rows, depth), draw(classes, depth, seed=1), draw(classes, seed=2)
    scores = exact_scores(x, weight, bias)
    plain = (x @ weight.T + bias - scores).abs().max()
    chosen = scores.gather(1, ours(x, weight, bias)[:, None])[:, 0]
    allowed = 2 * (2 * plain + torch.finfo(torch.float32).eps * scores.abs().max())
    assert (scores.amax(1) - chosen).max() <= allowed
    assert (ours(x, weight, bias) == scores.argmax(1)).float().mean() > 0.98


def test_products_of_fp32_are_not_rounded_to_tf32() -> None:
    """2**-12 beside 1 is below tf32's last place, and decides."""
    x = torch.ones(3, 32, device=DEVICE)
    weight = torch.ones(300, 32, device=DEVICE)
    weight[290, 5] += 2**-12
    assert ours(x, weight).tolist() == [290] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_compared_in_fp32(dtype) -> None:
    check_exactly(integers(20, 72).to(dtype), integers(600, 72, seed=1).to(dtype), integers(600))
    # Scores near 100 in 16 bits would be 1/16 or 1/2 apart; the inputs tell them apart.
    x = torch.ones(2, 104, dtype=dtype, device=DEVICE)
    weight = torch.ones(300, 104, dtype=dtype, device=DEVICE)
    weight[7, 0], weight[280, 0] = 1 + 2**-7, 1 + 2**-6
    assert ours(x, weight).tolist() == [280, 280]
    # And the bias keeps its own precision.
    bias = torch.zeros(300, device=DEVICE)
    bias[11], bias[12] = 1 + 2**-16, 1 + 2**-15
    assert ours(x, torch.ones_like(weight), bias).tolist() == [12, 12]


def test_the_weight_is_taken_in_the_dtype_of_x() -> None:
    """As the reference takes it on a GPU: here all three classes round to one, and tie."""
    weight = torch.ones(3, 16, device=DEVICE)
    weight[1, 0], weight[2, 0] = 1 + 2**-12, 1 + 2**-11
    x = torch.ones(1, 16, device=DEVICE)
    assert ours(x.bfloat16(), weight).tolist() == [0]
    assert ours(x, weight).tolist() == [2]
    assert ours(x, weight.half()).tolist() == [0]


@pytest.mark.parametrize(
    "special",
    [
        pytest.param({}, id="nothing but -inf"),
        pytest.param({3: NAN}, id="NaN is larger than all"),
        pytest.param({590: NAN, 40: NAN}, id="the first NaN, tiles apart"),
        pytest.param({2: INF, 300: NAN}, id="NaN is larger than inf of an earlier tile"),
        pytest.param({300: NAN, 301: INF, 20: INF, 21: NAN}, id="and of its own tile"),
        pytest.param({599: INF, 300: INF}, id="the first inf"),
        pytest.param({599: -3e38}, id="the last class"),
    ],
)
def test_nan_and_infinities_as_torch_has_them(special) -> None:
    bias = torch.full((600,), -INF, device=DEVICE)
    for place, value in special.items():
        bias[place] = value
    x, weight = draw(5, 16), draw(600, 16, seed=1)
    scores = x @ weight.T + bias
    assert torch.equal(ours(x, weight, bias), scores.argmax(-1))


def test_rows_do_not_see_each_other() -> None:
    x, weight = integers(140, 40), integers(500, 40, seed=1)
    expected = ours(x, weight)
    x[[3, 135]] = NAN
    found = ours(x, weight)
    assert found[[3, 135]].tolist() == [0, 0]
    others = [row for row in range(140) if row not in (3, 135)]
    assert torch.equal(found[others], expected[others])


def test_many_tiles_are_reduced_in_turns(monkeypatch) -> None:
    """Two tiles at a time, winners in each of five; among equals the first turn's stays."""
    from fastbeit_kernels._linear_argmax import configs

    monkeypatch.setattr(configs, "REDUCED_TILES", 2)
    x = torch.eye(8, device=DEVICE)
    weight = torch.zeros(1100, 8, device=DEVICE)
    for row, winners in enumerate([(5,), (300, 900), (600,), (1099, 800), (1024,), (0, 1099)]):
        weight[list(winners), row] = 1
    weight[[700, 1050], 6] = NAN
    expected = (x @ weight.nan_to_num(nan=7.0).T).argmax(-1)
    assert expected.tolist() == [5, 300, 600, 800, 1024, 0, 700, 0]
    assert torch.equal(ours(x, weight.nan_to_num(nan=7.0)), expected)
    # 0 * NaN is NaN, in every row.
    assert ours(x, weight).tolist() == [700] * 8


@pytest.mark.parametrize("group_rows", [128, 256, 4096])
def test_every_tile_is_computed_whatever_the_order_of_programs(group_rows, monkeypatch) -> None:
    """Five row tiles: groups of one, of two with one left over, and one that is not filled."""
    from fastbeit_kernels._linear_argmax import configs

    monkeypatch.setattr(configs, "GROUP_ROWS", group_rows)
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: make(*a, **k).fill_(99))
    check_exactly(integers(520, 16), integers(700, 16, seed=1))


@pytest.mark.parametrize(
    ("family", "bits"), [("sm_80", 16), ("sm_86", 16), ("sm_90", 16), ("sm_100", 16), ("sm_90", 32)]
)
def test_every_launch_choice_computes_the_same(family, bits, monkeypatch) -> None:
    from fastbeit_kernels._linear_argmax import configs, ops

    fp32 = {tile for (_, size), tile in configs.TILES.items() if size == 32}
    assert len(fp32) == 1, "one for all: then it is enough to try one"
    monkeypatch.setattr(ops, "tile_for", lambda x: configs.TILES[family, bits])
    check_exactly(integers(150, 40), integers(300, 40, seed=1), integers(300))


def as_view(tensor, kind):
    """The same values in other memory; around them NaN, so that an over-read shows."""
    rows, depth = tensor.shape
    if kind == "columns first":
        return tensor.t().contiguous().t()
    if kind == "a wider tensor's columns":
        memory = tensor.new_full((rows + 2, depth + 24), NAN)
        view = memory[1:-1, 16:-8]
    elif kind == "odd offset":
        memory = tensor.new_full((tensor.numel() + 3,), NAN)
        view = memory[3:].view(tensor.shape)
    elif kind == "odd rows":
        view = tensor.new_full((rows, depth + 3), NAN)[:, :depth]
    else:
        view = tensor.new_full((rows, 2 * depth), NAN)[:, ::2]
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind",
    ["columns first", "a wider tensor's columns", "odd offset", "odd rows", "every second element"],
)
def test_views(kind, dtype) -> None:
    x, weight, bias = integers(20, 24).to(dtype), integers(300, 24, seed=1).to(dtype), integers(300)
    wide_bias = torch.full((600,), NAN, device=DEVICE)[::2].copy_(bias)
    found = ours(as_view(x, kind), as_view(weight, kind), wide_bias)
    assert torch.equal(found, exact_scores(x, weight, bias).argmax(-1))


def test_views_whose_rows_lie_in_one_piece_are_not_copied() -> None:
    from fastbeit_kernels._linear_argmax.ops import wide_rows

    memory = torch.zeros(12, 64, dtype=torch.bfloat16, device=DEVICE)
    for view in (memory, memory[2:, 16:56], memory[::3], memory[:1].expand(5, 64)):
        assert wide_rows(view).data_ptr() == view.data_ptr()
    convolution = torch.zeros(30, 16, 1, 1, device=DEVICE)
    assert wide_rows(convolution[:, :, 0, 0]).data_ptr() == convolution.data_ptr()
    padded = wide_rows(memory[:, :13] + 1)
    assert padded.shape == (12, 16) and (padded[:, :13] == 1).all() and (padded[:, 13:] == 0).all()


def test_no_logits_are_written_and_nothing_unwritten_is_read(monkeypatch) -> None:
    x, weight = integers(64, 16), integers(4096, 16, seed=1)
    sizes, make = [], torch.empty

    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        sizes.append(tensor.numel())
        return tensor.fill_(NAN if tensor.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poisoned)
    check_exactly(x, weight)
    assert len(sizes) == 3 and max(sizes) <= 64 * 4096 / 100


def test_autograd_stops_and_autocast_changes_nothing() -> None:
    x, weight = torch.ones(2, 16, device=DEVICE), torch.ones(3, 16, device=DEVICE)
    weight[1, 0], weight[2, 0] = 1 + 2**-12, 1 + 2**-11
    codes = ours(x.requires_grad_(), weight.requires_grad_(), torch.zeros(3, requires_grad=True))
    assert not codes.requires_grad and codes.grad_fn is None
    with torch.autocast(DEVICE, torch.bfloat16):
        assert ours(x, weight).tolist() == [2, 2], "compared in 16 bits"
        assert linear_argmax(x, weight, impl="reference").tolist() == [2, 2]


def test_opcheck_and_one_graph() -> None:
    from fastbeit_kernels._linear_argmax.ops import argmax_operator

    x, weight, bias = draw(9, 24), draw(300, 24, seed=1), draw(300)
    opcheck(argmax_operator, (x, weight, bias))
    opcheck(argmax_operator, (x[:, ::2], weight[:, ::2], None))

    def model(x, weight, bias):
        return linear_argmax(x * 2, weight, bias, impl="triton") + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    leaves = x.requires_grad_(), weight.requires_grad_(), bias
    assert torch.equal(compiled(*leaves), model(*leaves))
    assert torch.equal(compiled(*leaves), ours(x * 2, weight, bias) + 1)


def test_what_the_kernels_cannot_do_is_refused_or_left_to_the_reference() -> None:
    x, weight = draw(2, 8), draw(5, 8)
    for arguments, message in (
        ((x.double(), weight), r"and x is torch\.float64"),
        ((x, weight, draw(5).double()), r"and bias is torch\.float64"),
        ((x[:0], weight), "there is nothing to compute: x is empty"),
        ((x, weight[:1].expand(65_537, 8)), "up to 65536 classes, and weight has 65537"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_argmax(*arguments, impl="triton")
        assert linear_argmax(*arguments).shape == arguments[0].shape[:1]
