"""Masks follow the blockwise rule: by its text, one image at a time, and by its statistics."""

import json
from math import exp, log, sqrt
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from fastbeit.data import MaskSpec, draw_masks, mask_positions
from fastbeit.data.philox import Stream, uniforms

GOLDEN = Path(__file__).parents[1] / "golden" / "blockwise_mask_14x14.json"
# A correct sampler fails one of the statistical tests with this probability, for a new seed.
FALSE_ALARM = 1e-6


def z_limit(comparisons: int = 1) -> float:
    """Two-sided, shared over ``comparisons`` (Bonferroni)."""
    return NormalDist().inv_cdf(1.0 - FALSE_ALARM / comparisons / 2.0)


def chi_square_limit(degrees: int) -> float:
    """Upper quantile by Wilson and Hilferty's cube, good to 1 % here."""
    spread = 2.0 / (9.0 * degrees)
    return degrees * (1.0 - spread + NormalDist().inv_cdf(1.0 - FALSE_ALARM) * sqrt(spread)) ** 3


def neighbour_agreement(masks):
    """Per image: mean of the horizontal and the vertical share of equal neighbours."""
    vertical = (masks[:, 1:] == masks[:, :-1]).mean(axis=(1, 2))
    horizontal = (masks[:, :, 1:] == masks[:, :, :-1]).mean(axis=(1, 2))
    return (vertical + horizontal) / 2.0


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def masks(golden):
    """As many draws as the official code's statistics have, from one seed and two epochs."""
    half = np.arange(golden["samples"] // 2)
    return np.concatenate([draw_masks(MaskSpec(), 20, epoch, half) for epoch in (0, 1)])


def test_counts_agree_with_the_official_histogram(masks, golden):
    n = golden["samples"]
    values = np.arange(0, 76)
    ours = np.array([(masks.sum(axis=(1, 2)) == value).sum() for value in values])
    theirs = np.array([round(n * golden["count_histogram"].get(str(v), 0.0)) for v in values])
    assert ours.sum() == theirs.sum() == n
    # Cells are merged up to 66, so that each expects more than 20 draws.
    ours, theirs = (np.append(c[:67].sum(), c[67:]) for c in (ours, theirs))
    statistic = ((ours - theirs) ** 2 / (ours + theirs)).sum()
    assert statistic < chi_square_limit(len(ours) - 1)

    counts = masks.sum(axis=(1, 2))
    error = sqrt(2.0 * counts.var() / n)
    assert abs(counts.mean() - golden["mean_count"]) < z_limit() * error


def test_rate_of_each_position_agrees(masks, golden):
    ours, theirs = masks.mean(axis=0), np.array(golden["mask_rate"])
    pooled = (ours + theirs) / 2.0
    z = (ours - theirs) / np.sqrt(2.0 * pooled * (1.0 - pooled) / golden["samples"])
    assert np.abs(z).max() < z_limit(z.size)
    # Were all bounds met by far, the errors would not be those of sampling: their spread is 1.
    assert 0.5 < z.std() < 1.5


def test_neighbours_agree_as_often(masks, golden):
    agreement = neighbour_agreement(masks)
    error = agreement.std() * sqrt(2.0 / golden["samples"])
    assert abs(agreement.mean() - golden["neighbour_agreement"]) < z_limit() * error


def mask_by_the_text(spec, seed, epoch, sample):
    """The rule of the paper and the released code for one image, a scalar at a time."""
    rows, columns = spec.grid
    mask = np.zeros(spec.grid, dtype=bool)
    count = attempt = 0
    while count < spec.target:
        cap = min(spec.target - count, spec.max_block or spec.target)
        for proposal in range(10):
            draw = attempt * 10 + proposal
            u = [float(x) for x in uniforms(seed, epoch, sample, Stream.MASK, draw)]
            area = spec.min_block + (cap - spec.min_block) * u[0]
            low, high = log(spec.min_aspect), log(1.0 / spec.min_aspect)
            aspect = exp(low + (high - low) * u[1])
            h, w = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if h >= rows or w >= columns:
                continue
            top, left = int(u[2] * (rows - h + 1)), int(u[3] * (columns - w + 1))
            block = mask[top : top + h, left : left + w]
            fresh = h * w - int(block.sum())
            if 0 < fresh <= cap:
                block[:] = True
                count += fresh
                break
        else:
            return mask
        attempt += 1
    return mask


@pytest.mark.parametrize(
    "spec",
    [
        MaskSpec(),  # the recipe
        MaskSpec(grid=(7, 7), target=20, min_block=4),  # the demo's grid
        MaskSpec(grid=(5, 9), target=18, min_block=3, min_aspect=0.5),  # not square
        MaskSpec(grid=(12, 8), target=40, min_block=6, max_block=12),  # max_block below target
        MaskSpec(grid=(3, 3), target=9, min_block=1),  # all of a tiny grid: many ends by failure
    ],
)
def test_equals_the_rule_one_image_at_a_time(spec):
    index = np.arange(60) * 31
    drawn = draw_masks(spec, 4, 2, index)
    for mask, sample in zip(drawn, index, strict=True):
        np.testing.assert_array_equal(mask, mask_by_the_text(spec, 4, 2, sample))


def test_a_mask_does_not_depend_on_its_batch():
    spec, index = MaskSpec(), np.array([9, 3, 3, 2**40, 0])
    together = draw_masks(spec, 0, 5, index)
    for sample, mask in zip(index, together, strict=True):
        np.testing.assert_array_equal(draw_masks(spec, 0, 5, [sample])[0], mask)
    assert (together[0] != draw_masks(spec, 0, 6, [9])[0]).any()
    assert (together[0] != draw_masks(spec, 1, 5, [9])[0]).any()
    assert draw_masks(spec, 0, 0, np.array([], dtype=np.int64)).shape == (0, 14, 14)


@pytest.mark.parametrize(("grid", "target"), [((14, 14), 75), ((5, 7), 1), ((3, 3), 9)])
def test_random_masks_hide_exactly_the_target_evenly(grid, target):
    n = 4000
    spec = MaskSpec(grid=grid, target=target, strategy="random")
    masks = draw_masks(spec, 1, 0, np.arange(n))
    assert masks.shape == (n, *grid)
    assert (masks.sum(axis=(1, 2)) == target).all()
    share = target / masks[0].size
    if share < 1.0:
        z = (masks.mean(axis=0) - share) / sqrt(share * (1.0 - share) / n)
        assert np.abs(z).max() < z_limit(z.size)
        assert len(np.unique(masks.reshape(n, -1), axis=0)) > min(n, masks[0].size) // 2


def test_no_mask_at_all():
    spec = MaskSpec(strategy="none")
    masks = draw_masks(spec, 0, 0, np.arange(3))
    assert masks.shape == (3, 14, 14)
    assert not masks.any()
    assert (mask_positions(masks, spec.slots) == -1).all()


def test_positions_are_ascending_raster_numbers_and_minus_one():
    masks = np.zeros((3, 2, 3), dtype=bool)
    masks[0, 1, 2] = masks[0, 0, 1] = masks[0, 1, 0] = True
    masks[2] = True
    positions = mask_positions(masks, 6)
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(positions, [[1, 3, 5, -1, -1, -1], [-1] * 6, [0, 1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="hides 6 patches, but there are 5 slots"):
        mask_positions(masks, 5)
    assert mask_positions(masks[:0], 5).shape == (0, 5)


def test_slots_hold_any_mask():
    spec = MaskSpec()
    masks = draw_masks(spec, 0, 0, np.arange(500))
    positions = mask_positions(masks, spec.slots)
    assert positions.shape == (500, 75)
    np.testing.assert_array_equal((positions >= 0).sum(axis=1), masks.sum(axis=(1, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 197}, "target must lie between 1 and the 196 patches"),
        ({"target": 0}, "target must lie between 1"),
        ({"grid": (0, 14)}, r"grid must have at least one row.*got \(0, 14\)"),
        ({"min_block": 76}, "min_block must lie between 1 and target = 75, got 76"),
        ({"min_block": 0}, "min_block must lie between 1"),
        ({"max_block": 15}, "max_block must be at least min_block = 16, got 15"),
        ({"min_aspect": 0.0}, r"min_aspect must lie in \(0, 1\], got 0.0"),
        ({"min_aspect": 1.5}, r"min_aspect must lie in \(0, 1\]"),
        ({"strategy": "blocks"}, "strategy must be 'block', 'random' or 'none', got 'blocks'"),
        ({"grid": (4, 4), "target": 16}, "no rectangle of min_block = 16 .* use a smaller"),
        ({"grid": (1, 100), "target": 30}, "no rectangle of min_block = 16"),
        ({"grid": (3, 100), "target": 90, "min_block": 60}, "no rectangle of min_block = 60"),
    ],
)
def test_impossible_specs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MaskSpec(**changes)
