"""The Triton masked loss against float64: values and every gradient, of every kind of call.

Without a GPU the kernels are interpreted; with one they run on it. How they are measured is in
``masked_loss_problems.py``.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_loss_problems import DEVICE, check, choices, problem, results, triton

pytest.importorskip("triton")

from fastbeit_kernels._cross_entropy import arguments, configs

# Padding holds whatever was in memory, and NumPy warns of its infinities; nothing of it is kept.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("batch", "tokens", "slots", "width", "classes", "bias"),
    [
        pytest.param(2, 197, 2, 48, 8192, True, id="BEiT's vocabulary, one row a tile"),
        pytest.param(3, 17, None, 300, 1000, True, id="rows selected, two a tile, 300 wide"),
        pytest.param(2, 9, 5, 16, 10, False, id="ten classes, no bias"),
        pytest.param(2, 9, 5, 16, 3001, True, id="classes that are a multiple of nothing"),
        pytest.param(1, 3, 2, 7, 16_411, True, id="rows too long for registers"),
        pytest.param(1, 7, 140, 8, 12, True, id="more slots than are looked through at once"),
        pytest.param(1, 1, 1, 1, 1, False, id="one of everything"),
    ],
)
def test_values_and_gradients(batch, tokens, slots, width, classes, bias, smoothing) -> None:
    tensors, positions, targets = problem(batch, tokens, slots, width, classes, bias=bias)
    targets[0, 0] = 0
    if positions is not None:
        positions[0, 0] = 0
    check(tensors, positions, targets, smoothing, dloss=3.0)


@settings(max_examples=6)
@given(data=st.data())
def test_any_shape_and_any_launch_choice(data) -> None:
    """Few programs, so that each has many rows; narrow blocks, so that rows have several."""
    size = st.integers(1, 16)
    batch, tokens, width = data.draw(st.integers(1, 3)), data.draw(size), data.draw(size)
    slots, classes = data.draw(st.none() | size), data.draw(st.integers(1, 150))
    bias, smoothing = data.draw(st.booleans()), data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    case = problem(batch, tokens, slots, width, classes, bias=bias, seed=tokens)
    whole = data.draw(st.sampled_from([0, 256]), label="whole_row")
    programs, pieces = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    with (
        choices(whole_row=whole, programs=programs, pieces=pieces),
        mock.patch.multiple(configs, FIRST_BLOCK=64, SECOND_BLOCK=32, SLOTS=16, SUM_ROWS=2),
    ):
        check(*case, smoothing, roundings=8)


@pytest.mark.parametrize("family", ["sm_80", "sm_86", "sm_90", "sm_100"])
@pytest.mark.parametrize("bits", [16, 32])
def test_every_launch_choice_computes_the_same(family, bits, monkeypatch) -> None:
    config = configs.LOSS[family, bits]
    monkeypatch.setattr(arguments, "config_of", lambda *_: config)
    check(*problem(2, 3, None, 4, 70))


def test_many_rows_a_program_are_summed() -> None:
    with choices(programs=2, pieces=2):
        check(*problem(2, 40, 17, 8, 2100, seed=3))


def test_both_paths_agree_at_the_boundary() -> None:
    """The largest row that lies in registers, and the same row in blocks."""
    case = problem(1, 2, None, 4, configs.HOPPER.whole_row)
    assert arguments.is_whole(configs.HOPPER, configs.HOPPER.whole_row)
    assert not arguments.is_whole(configs.HOPPER, configs.HOPPER.whole_row + 1)
    whole, counts = check(*case)
    with choices(whole_row=0), mock.patch.object(configs, "SUM_COLUMNS", 2048):
        blocks, again = results(triton, *case)
    assert counts == again
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("whole_row", [0, 256])
def test_empty_slots_pass_nothing(whole_row) -> None:
    """By position or by target; behind them lie NaN, and targets that are no class."""
    (hidden, weight, bias), _, _ = problem(2, 6, None, 5, 19)
    positions = torch.tensor([[3, -1, 0, 5], [-1, 4, 2, 2]], device=DEVICE)
    targets = torch.tensor([[7, 10**12, -1, 18], [-(10**12), 0, -5, 3]], device=DEVICE)
    with choices(whole_row=whole_row):
        clean, counts = check([hidden, weight, bias], positions, targets, 0.1)
        assert counts[1] == 4
        unnamed = torch.tensor([[0, 1, 2, 4], [0, 1, 3, 5]], device=DEVICE)
        poisoned = hidden.clone()
        for image, rows in enumerate(unnamed):
            assert (clean[1][image, rows] == 0).all()
            poisoned[image, rows] = float("nan")
        found, again = results(triton, [poisoned, weight, bias], positions, targets, 0.1)
    assert again == counts
    for mine, other in zip(found, clean, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("whole_row", [0, 256])
@pytest.mark.parametrize("named", [True, False])
def test_no_filled_slot_at_all(whole_row, named) -> None:
    (hidden, weight, bias), _, _ = problem(2, 3, None, 4, 11)
    nothing = torch.full((2, 3), -1, device=DEVICE)
    targets = torch.full((2, 3), 10**9, device=DEVICE) if named else nothing
    hidden = torch.full_like(hidden, float("nan"))
    with choices(whole_row=whole_row):
        found, counts = results(
            triton, [hidden, weight, bias], nothing if named else None, targets, 0.1
        )
    assert counts == (0, 0)
    assert all((one == 0).all() for one in found)


def test_positions_repeat_and_add_up_in_order() -> None:
    """Repeats within what is looked through at once (128 slots) and across it."""
    positions = torch.tensor([[4] * 150, [*range(6)] * 25], device=DEVICE, dtype=torch.int16)
    tensors, _, targets = problem(2, 6, 150, 8, 12)
    with choices(programs=2):
        ours, _ = check(tensors, positions, targets)
    assert (ours[1][0, [0, 1, 2, 3, 5]] == 0).all() and (ours[1][0, 4] != 0).all()


@pytest.mark.parametrize("whole_row", [0, 256])
def test_what_no_class_or_row_has_is_nan_and_reads_nothing(whole_row) -> None:
    (hidden, weight, bias), _, _ = problem(1, 4, None, 4, 9)
    good = torch.tensor([[0, 2, 8]], device=DEVICE)
    for positions, targets in (
        ([[0, 1, 2]], [[0, 9, 8]]),
        ([[0, 1, 2]], [[0, 2**31 + 2, 8]]),
        ([[0, 4, 2]], [[0, 2, 8]]),
        ([[0, 2**32 + 1, 2]], [[0, 2, 8]]),
    ):
        case = [torch.tensor(x, device=DEVICE) for x in (positions, targets)]
        with choices(whole_row=whole_row):
            found, counts = results(triton, [hidden, weight, bias], *case)
        assert counts[1] == 3
        assert found[0].isnan() and found[2].isnan().all() and found[3].isnan().all()
        assert found[1][0, [0, 2]].isfinite().all()
        if torch.equal(case[1], good):
            assert (found[1][0, [1, 3]] == 0).all()


@pytest.mark.parametrize("whole_row", [0, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_of_equal_logits_is_the_answer(whole_row, dtype) -> None:
    """Classes 3, 70 and 130 score alike and best, in three blocks or in one."""
    weight = torch.zeros(150, 4, dtype=dtype, device=DEVICE)
    weight[[3, 70, 130]] = 2.0
    weight[10] = 1.0
    hidden = torch.ones(1, 5, 4, dtype=dtype, device=DEVICE)
    targets = torch.tensor([[3, 70, 130, 10, 3]], device=DEVICE)
    with choices(whole_row=whole_row), mock.patch.object(configs, "FIRST_BLOCK", 64):
        out = triton(hidden, None, weight, None, targets)
        assert (out.correct.item(), out.count.item()) == (2, 5)
        assert out.correct.dtype == out.count.dtype == torch.int64
        nothing = triton(hidden, None, torch.zeros_like(weight), None, targets * 0)
        assert nothing.correct.item() == 5
        # A NaN is no right answer.
        hidden[0, 0] = float("nan")
        assert triton(hidden, None, weight, None, targets).correct.item() == 1


@pytest.mark.parametrize("whole_row", [0, 256])
def test_equal_logits_in_one_group_of_eight_classes_and_across_two(whole_row) -> None:
    """Whole rows tell classes apart by groups of eight. Row by row the label and another class
    score alike: the label is the answer where it is the lower of the two."""
    classes = (0, 1, 6, 7, 8, 9, 15, 16, 23)
    pairs = [(low, high) for low in classes for high in classes if low < high]
    weight = torch.zeros(40, len(pairs), device=DEVICE)
    for row, pair in enumerate(pairs):
        weight[list(pair), row] = 1.0
    hidden = torch.eye(len(pairs), device=DEVICE)[None]
    lower, higher = torch.tensor(pairs, device=DEVICE).T
    with choices(whole_row=whole_row):
        assert triton(hidden, None, weight, None, lower[None]).correct.item() == len(pairs)
        assert triton(hidden, None, weight, None, higher[None]).correct.item() == 0


@pytest.mark.parametrize("whole_row", [0, 256])
def test_a_bias_of_minus_infinity_takes_a_class_out(whole_row) -> None:
    (hidden, weight, bias), _, targets = problem(1, 6, None, 4, 9)
    targets = targets.clamp(min=0) % 8
    bias[8] = float("-inf")
    with choices(whole_row=whole_row):
        out, counts = results(triton, [hidden, weight, bias], None, targets)
        fewer, same = results(triton, [hidden, weight[:8], bias[:8]], None, targets)
    assert counts == same
    assert (out[2][8] == 0).all() and out[3][8] == 0
    for mine, other in zip((out[0], out[1], out[2][:8], out[3][:8]), fewer, strict=True):
        torch.testing.assert_close(mine, other)
