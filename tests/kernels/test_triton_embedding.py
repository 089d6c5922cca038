"""embed_patches in Triton against float64: values and every gradient, of every kind of call.

Without a GPU the kernels are interpreted; with one they run on it. The measure of an error is in
``embedding_problems.py``.
"""

from __future__ import annotations

import math

import pytest
import torch
from embedding_problems import DEVICE, check, distance, draw, in_dtype, problem, results, same
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
# Masked patches may hold anything, and NumPy warns of its infinities; nothing of it is kept.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(
            {"batch": 1, "grid": (14, 14), "patch": (16, 16), "slots": 75, "pos_embed": None},
            id="BEiT: 224 pixels, 75 masked",
        ),
        pytest.param({"grid": (2, 3), "patch": (16, 16), "slots": None}, id="ViT: nothing masked"),
        pytest.param({"patch": (14, 14), "bias": None}, id="patches of 14"),
        pytest.param({"width": 300, "channels": 1}, id="two tiles of the width, one colour"),
        pytest.param({"patch": (10, 9), "channels": 4}, id="360 pixels: two tiles of the gradient"),
        pytest.param({"grid": (1, 1), "slots": 1, "batch": 3}, id="one patch, masked or not"),
        pytest.param({"grid": (7, 2), "patch": (1, 1), "channels": 1}, id="patches of one pixel"),
        pytest.param({"batch": 37, "grid": (1, 3), "slots": 1}, id="images come 16 at a time"),
        pytest.param({"slots": 0}, id="no slot for a masked patch"),
    ],
)
def test_values_and_gradients(shape) -> None:
    check(*problem(**shape))


@settings(max_examples=5)
@given(data=st.data())
def test_any_shape(data) -> None:
    size = st.integers(1, 4)
    shape = {
        "batch": data.draw(size),
        "channels": data.draw(st.integers(1, 4)),
        "grid": (data.draw(size), data.draw(size)),
        "patch": (data.draw(size), data.draw(size)),
        "width": data.draw(st.integers(1, 40)),
        "slots": data.draw(st.none() | st.integers(1, 9)),
    }
    absent = {name: None for name in ("bias", "pos_embed") if data.draw(st.booleans())}
    arguments, dout = problem(**shape, **absent, seed=data.draw(st.integers(0, 9)))
    if data.draw(st.booleans()):
        arguments["images"] = arguments["images"].contiguous(memory_format=torch.channels_last)
    check(arguments, dout)


@pytest.mark.parametrize("hides", ["all", "none", "one image's"])
def test_masked_is_all_nothing_or_one_image(hides) -> None:
    arguments, dout = problem(batch=3, slots=12)
    rows = torch.arange(12, device=DEVICE).expand(3, 12).clone()
    if hides != "all":
        rows[[0, 2] if hides == "one image's" else [0, 1, 2]] = -1
    arguments["positions"] = rows
    ours = results(arguments, dout)
    check(arguments, dout) if hides != "all" else None
    if hides == "all":
        assert (ours["weight"] == 0).all() and (ours["bias"] == 0).all()
        expected = arguments["mask_token"] + arguments["pos_embed"][1:]
        assert torch.equal(ours["out"][:, 1:], expected.expand(3, -1, -1))
    if hides == "none":
        assert (ours["mask_token"] == 0).all()


@pytest.mark.parametrize(("channels", "side"), [(3, 4), (1, 16)], ids=["48 pixels", "256: whole"])
def test_what_masked_patches_hold_changes_no_bit(channels, side) -> None:
    """Neither their pixels nor, but for the mask token's gradient, what comes back to them."""
    arguments, dout = problem(3, channels, patch=(side, side), slots=None, pos_embed=None)
    # 24 visible tokens: the gradient's last step of 32 reaches over CLS to masked ones.
    rows = [[5, 8, 5, 7, 6], [0, 11, 3, 1, 2], [-1, -1, 7, 9, 10]]
    arguments["positions"] = torch.tensor(rows, device=DEVICE)
    arguments["mask_token"] = draw(20, seed=9)
    expected = check(arguments, dout)
    for b, row in enumerate(arguments["positions"].tolist()):
        for patch in (patch for patch in row if patch >= 0):
            y, x = patch // 4 * side, patch % 4 * side
            arguments["images"][b, :, y : y + side, x : x + side] = math.nan
            dout[b, 1 + patch] = math.nan
    found = results(arguments, dout)
    assert found.pop("mask_token").isnan().all()
    expected.pop("mask_token")
    same(found, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="products are counted where they are interpreted")
def test_masked_patches_are_not_projected(monkeypatch) -> None:
    """Products of the projection and of its gradient: as many as visible patches need tiles."""
    from fastbeit_kernels._embedding import arguments as launches
    from fastbeit_kernels._embedding import backward, forward

    def counted(module):
        calls, multiply = [], module.dot_add

        def count(*operands):
            calls.append(operands)
            return multiply(*operands)

        monkeypatch.setattr(module, "dot_add", count)
        return calls

    forwards, backwards = counted(forward), counted(backward)
    batch, patches, visible = 32, 16, 4
    arguments, dout = problem(batch=batch, grid=(4, 4), patch=(2, 2), width=8, slots=12)
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randperm(16, generator=generator)[:12] for _ in range(batch)]
    arguments["positions"] = torch.stack(hidden)
    config = launches.config_of(arguments["images"].device, torch.float32)
    rows, depth = config.positions.rows, config.weight.depth
    results(arguments, dout)
    some, every = batch * visible, batch * patches
    assert (len(forwards), len(backwards)) == (some // rows, some // depth) == (1, 4)
    results({**arguments, "positions": None, "mask_token": None}, dout)
    assert (len(forwards) - 1, len(backwards) - 4) == (every // rows, every // depth) == (4, 16)


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64, torch.int8])
def test_the_list_of_tokens(block, integer, monkeypatch) -> None:
    """Every token once: visible patches first, in order, then each image's CLS and masked ones."""
    from fastbeit_kernels._embedding import configs, ops

    monkeypatch.setattr(configs, "ORDER_BLOCK", block)
    batch, patches = 19, 33
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(-1, patches, (batch, 21), generator=generator)
    # A position that is none hides nothing, and writes nothing behind the last image's flags.
    positions[3] = positions[-1] = torch.tensor([33, 90, -7] * 7)
    made, make = [], torch.empty

    def guarded(*shape, **options):
        made.append(make(math.prod(shape) + 64, **options).fill_(7))
        return made[-1][:-64].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    flags, listed, visible = ops.embed_order(positions.to(DEVICE, integer).int(), patches)
    assert len(made) == 4 and all((memory[-64:] == 7).all() for memory in made)
    hidden = torch.zeros(batch, patches, dtype=torch.bool)
    for b, row in enumerate(positions.tolist()):
        hidden[b, [p for p in row if 0 <= p < patches]] = True
    numbers = torch.arange(batch * (patches + 1)).view(batch, patches + 1)
    others = torch.cat((torch.ones(batch, 1, dtype=torch.bool), hidden), 1)
    assert torch.equal(flags.cpu(), hidden.int())
    assert torch.equal(listed.cpu(), torch.cat((numbers[~others], numbers[others])).int())
    assert visible.tolist() == [(~others).sum()]


def as_view(images, kind):
    """The same values in other memory; around them NaN, so that an over-read shows."""
    batch, channels, height, width = images.shape
    if kind == "channels-last":
        return images.contiguous(memory_format=torch.channels_last)
    if kind == "cut from channels-last":
        memory = images.new_full((batch + 1, height + 2, width + 3, channels), math.nan)
        view = memory[1:, 1:-1, 2:-1].permute(0, 3, 1, 2)
    elif kind == "some colours of channels-last":
        memory = images.new_full((batch, height, width, channels + 2), math.nan)
        view = memory[..., 1:-1].permute(0, 3, 1, 2)
    elif kind == "cut out":
        memory = images.new_full((batch, channels + 1, height + 2, width + 3), math.nan)
        view = memory[:, 1:, 1:-1, 2:-1]
    elif kind == "odd offset":
        view = images.new_full((images.numel() + 3,), math.nan)[3:].view(images.shape)
    elif kind == "turned":
        view = images.new_full((width, channels, batch, height), math.nan).permute(2, 1, 3, 0)
    else:
        view = images.new_full((batch, channels, height, 2 * width), math.nan)[..., ::2]
    return view.copy_(images)


@pytest.mark.parametrize(
    "kind",
    [
        "channels-last",
        "cut from channels-last",
        "some colours of channels-last",
        "cut out",
        "odd offset",
        "turned",
        "every second",
    ],
)
def test_views_of_images(kind) -> None:
    arguments, dout = problem()
    expected = results(arguments, dout)
    arguments["images"] = as_view(arguments["images"], kind)
    if kind in ("channels-last", "cut from channels-last"):  # Pixels are added in another order.
        for name, mine in check(arguments, dout).items():
            torch.testing.assert_close(mine, expected[name], rtol=1e-5, atol=1e-5)
    else:
        same(results(arguments, dout), expected)


def test_views_of_parameters_and_of_the_gradient() -> None:
    arguments, dout = problem()
    expected = results(arguments, dout)
    viewed = dict(arguments)
    viewed["weight"] = arguments["weight"].contiguous(memory_format=torch.channels_last)
    viewed["positions"] = arguments["positions"].t().contiguous().t()
    for name in ("bias", "cls_token", "mask_token", "pos_embed"):
        memory = arguments[name].repeat_interleave(2, -1)
        memory[..., 1::2] = math.nan
        viewed[name] = memory[..., ::2]
    turned = dout.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    same(results(viewed, turned), expected)
    cut = dout.new_full((2, 15, 28), math.nan)[:, 1:-1, 4:-4].copy_(dout)
    same(results(viewed, cut), expected)
    one = dout[:, :1].expand_as(dout)
    same(results(arguments, one), results(arguments, one.contiguous()))


def test_nothing_unwritten_is_read_and_everything_is_written(monkeypatch) -> None:
    """Fresh memory full of NaN gives the same bits."""
    grid = (2, 2)
    cases = [
        problem(grid=grid),
        problem(grid=grid, slots=None, width=300, bias=None),
        problem(grid=grid, pos_embed=None),
    ]
    expected = [results(*case) for case in cases]
    made, make = [], torch.empty

    def poisoned(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1].fill_(math.nan if made[-1].is_floating_point() else 2)

    monkeypatch.setattr(torch, "empty", poisoned)
    for case, before in zip(cases, expected, strict=True):
        same(results(*case), before)
    assert len(made) > 20


@pytest.mark.parametrize(
    ("family", "bits"), [("sm_80", 16), ("sm_86", 16), ("sm_90", 16), ("sm_100", 16), ("sm_90", 32)]
)
def test_every_launch_choice_computes_the_same(family, bits, monkeypatch) -> None:
    from fastbeit_kernels._embedding import arguments as launches
    from fastbeit_kernels._embedding import configs

    fp32 = {config for (_, size), config in configs.CONFIGS.items() if size == 32}
    assert len(fp32) == 1, "one for all: then it is enough to try one"
    config = configs.CONFIGS[family, bits]
    monkeypatch.setattr(launches, "config_of", lambda *_: config)
    monkeypatch.setattr(launches, "shares_for", lambda *_: 3)
    shape = {"batch": 14, "grid": (1, 5), "patch": (5, 6), "width": 70, "slots": 1}
    check(*problem(**shape, pos_embed=None))
    check(*problem(**shape))


def test_results_repeat_bit_by_bit_and_images_do_not_see_each_other() -> None:
    arguments, dout = problem(batch=5, grid=(2, 3))
    first = results(arguments, dout)
    same(results(arguments, dout), first)
    alone = dict(arguments)
    for name in ("images", "positions"):
        alone[name] = arguments[name][3:4]
    found = results(alone, dout[3:4])["out"]
    if DEVICE == "cuda":
        assert torch.equal(found, first["out"][3:4])
    # NumPy adds a product's row in an order that depends on where in the tile it lies.
    torch.testing.assert_close(found, first["out"][3:4], rtol=1e-5, atol=1e-5)
    arguments["images"][3] = math.nan
    others = [0, 1, 2, 4]
    assert torch.equal(results(arguments, dout)["out"][others], first["out"][others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", ["tokens of 16 bits", "tokens of fp32"])
def test_half_precision(dtype, tokens) -> None:
    """Norm-wise; u is half a unit in the last place. Products of 16-bit numbers and their sums are
    fp32: the output is rounded once, to its own dtype, and so is each gradient, to its parameter's;
    dout is rounded too before it is multiplied. The interpreter cuts bf16 off where a device
    rounds: 2 u."""
    arguments, dout = problem(batch=4, grid=(3, 4), patch=(8, 8))
    arguments = in_dtype(arguments, dtype)
    if tokens == "tokens of fp32":
        for name in ("cls_token", "mask_token", "pos_embed"):
            arguments[name] = arguments[name].float()
    else:
        dout = dout.to(dtype)
    cut = DEVICE == "cpu" and dtype == torch.bfloat16
    u, eps = torch.finfo(dtype).eps / (1 if cut else 2), torch.finfo(torch.float32).eps
    ours = results(arguments, dout)
    truth = results(in_dtype(arguments, torch.float64), dout.double(), "reference")
    for name, exact in truth.items():
        wanted = arguments[name].dtype if name != "out" else dout.dtype
        assert ours[name].dtype == wanted, name
        roundings = (wanted == dtype) + (name == "weight" and dout.dtype != dtype)
        assert distance(ours[name], exact) <= roundings * u + 8 * eps, name


def test_images_of_any_dtype_are_cast_to_the_weights() -> None:
    arguments, dout = problem()
    arguments["weight"] = arguments["weight"].half()
    rounded = {**arguments, "images": arguments["images"].half()}
    same(results(arguments, dout), results(rounded, dout))
    exact = in_dtype(rounded, torch.float32)
    same(results({**exact, "images": rounded["images"]}, dout), results(exact, dout))
