"""The plan: right distributions, torchvision's crop rule, a function of seed, epoch, index only."""

import time
from itertools import permutations
from math import exp, log, sqrt
from statistics import NormalDist

import numpy as np
import pytest

from fastbeit.data import MaskSpec, Plan, PlanSpec, draw_masks, draw_plan, mask_positions
from fastbeit.data.philox import Stream, uniforms

# A correct sampler fails one of the statistical tests with this probability, for a new seed.
FALSE_ALARM = 1e-6
FULL = PlanSpec(drop_path=0.1, depth=12)


def chi_square_limit(degrees: int) -> float:
    """Upper quantile by Wilson and Hilferty's cube."""
    spread = 2.0 / (9.0 * degrees)
    return degrees * (1.0 - spread + NormalDist().inv_cdf(1.0 - FALSE_ALARM) * sqrt(spread)) ** 3


def check_uniform(values, low, high, cells=20):
    """Chi-square of a continuous uniform distribution on [low, high]."""
    assert values.min() >= low
    assert values.max() <= high
    counts, _ = np.histogram(values, bins=cells, range=(low, high))
    expected = len(values) / cells
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(cells - 1)


def sizes_of(count, height=375, width=500):
    return np.tile([[height, width]], (count, 1))


@pytest.fixture(scope="module")
def plan():
    return draw_plan(FULL, 3, 0, np.arange(20_000), sizes_of(20_000))


def test_shapes_and_dtypes(plan):
    expected = {
        "index": (np.int64, (20_000,)),
        "box": (np.int32, (20_000, 4)),
        "flip": (np.bool_, (20_000,)),
        "jitter": (np.float32, (20_000, 3)),
        "jitter_order": (np.uint8, (20_000, 3)),
        "positions": (np.int32, (20_000, 75)),
        "drop_scale": (np.float32, (20_000, 24)),
    }
    assert {name: (a.dtype.type, a.shape) for name, a in plan._asdict().items()} == expected


def test_positions_are_those_of_the_masks(plan):
    masks = draw_masks(FULL.mask, 3, 0, np.arange(20_000))
    np.testing.assert_array_equal(plan.positions, mask_positions(masks, 75))


def test_a_sample_does_not_depend_on_its_batch(plan):
    index = np.array([77, 5, 19_999, 5])
    part = draw_plan(FULL, 3, 0, index, sizes_of(4))
    for name, whole in plan._asdict().items():
        np.testing.assert_array_equal(getattr(part, name), whole[index], err_msg=name)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"epoch": 1}])
def test_seed_and_epoch_change_everything(plan, changed):
    arguments = {"seed": 3, "epoch": 0} | changed
    other = draw_plan(FULL, index=np.arange(500), sizes=sizes_of(500), **arguments)
    for name, whole in plan._asdict().items():
        if name != "index":
            assert (getattr(other, name) != whole[:500]).any(axis=-1).mean() > 0.3, name


def test_decisions_of_one_sample_are_independent(plan):
    columns = np.column_stack(
        [
            *plan.box.T,
            plan.flip,
            *plan.jitter.T,
            plan.jitter_order[:, 0],
            (plan.positions >= 0).sum(axis=1),
            plan.drop_scale[:, 22:].T[0],
            plan.drop_scale[:, 22:].T[1],
        ]
    ).astype(float)
    correlation = np.corrcoef(columns, rowvar=False)
    box, pairs = 4, 66
    correlation[:box, :box] = 0.0  # corner and size of a box do depend on each other
    np.fill_diagonal(correlation, 0.0)
    limit = NormalDist().inv_cdf(1.0 - FALSE_ALARM / pairs / 2.0) / sqrt(len(columns))
    assert np.abs(correlation).max() < limit


def test_flip_jitter_and_order_are_distributed_as_the_recipe_says(plan):
    n = len(plan.index)
    assert abs(plan.flip.mean() - 0.5) < NormalDist().inv_cdf(1 - FALSE_ALARM / 2) * 0.5 / sqrt(n)
    for factor in plan.jitter.T:
        check_uniform(factor, 0.6, 1.4 + 1e-6)
    orders = [tuple(order) for order in plan.jitter_order.tolist()]
    counts = np.array([orders.count(order) for order in permutations(range(3))])
    assert counts.sum() == n
    assert ((counts - n / 6) ** 2 / (n / 6)).sum() < chi_square_limit(5)


def test_jitter_bounds_and_switched_off_parts():
    strong = draw_plan(PlanSpec(jitter=(0.0, 1.5, 0.2)), 0, 0, np.arange(5000), sizes_of(5000))
    assert (strong.jitter[:, 0] == 1.0).all()
    check_uniform(strong.jitter[:, 1], 0.0, 2.5)
    check_uniform(strong.jitter[:, 2], 0.8 - 1e-6, 1.2 + 1e-6)
    for probability in (0.0, 1.0):
        flips = draw_plan(PlanSpec(flip=probability), 0, 0, np.arange(99), sizes_of(99)).flip
        assert (flips == bool(probability)).all()


def crop_by_the_text(spec, seed, epoch, sample, height, width):
    """torchvision's RandomResizedCrop.get_params, a scalar at a time: (box, tries used)."""
    log_low, log_high = log(spec.crop_ratio[0]), log(spec.crop_ratio[1])
    for attempt in range(10):
        u = [float(x) for x in uniforms(seed, epoch, sample, Stream.CROP, attempt)]
        low, high = spec.crop_scale
        area = height * width * (low + (high - low) * u[0])
        ratio = exp(log_low + (log_high - log_low) * u[1])
        w, h = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w), attempt + 1
    if width / height < min(spec.crop_ratio):
        w, h = width, round(width / min(spec.crop_ratio))
    elif width / height > max(spec.crop_ratio):
        w, h = round(height * max(spec.crop_ratio)), height
    else:
        w, h = width, height
    return ((height - h) // 2, (width - w) // 2, h, w), 11


@pytest.mark.parametrize(
    ("size", "centred"),
    [
        ((375, 500), False),
        ((28, 28), False),
        ((1, 1), False),
        ((100, 400), True),  # a try fits seldom: first successes at each of the ten
        ((30, 2000), True),
        ((900, 9), True),
    ],
)
def test_boxes_equal_the_rule_one_image_at_a_time(size, centred):
    index = np.arange(300) * 17
    boxes = draw_plan(PlanSpec(), 6, 1, index, sizes_of(300, *size)).box
    expected = [crop_by_the_text(PlanSpec(), 6, 1, sample, *size) for sample in index]
    np.testing.assert_array_equal(boxes, [box for box, _ in expected])
    tries = np.array([tries for _, tries in expected])
    assert (tries == 11).any() == centred
    if size == (100, 400):
        assert set(tries) == set(range(1, 12))


def test_boxes_are_distributed_as_torchvision_draws_them():
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms", reason="compares with torchvision")
    n, height, width = 4000, 60, 100
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    draw = transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])
    ours = draw_plan(PlanSpec(), 1, 0, np.arange(n), sizes_of(n, height, width)).box
    measures = [lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3]]
    measures.append(lambda b: b[:, 3] / b[:, 2])
    for measure in measures:
        edges = np.unique(np.quantile(measure(theirs), np.linspace(0, 1, 21)))
        edges[0], edges[-1] = -np.inf, np.inf
        a, b = (np.histogram(measure(boxes), bins=edges)[0] for boxes in (ours, theirs))
        assert ((a - b) ** 2 / (a + b)).sum() < chi_square_limit(len(a) - 1)


def test_boxes_lie_inside_images_of_any_size():
    sizes = np.random.default_rng(0).integers(1, 300, (3000, 2))
    box = draw_plan(PlanSpec(), 0, 0, np.arange(3000), sizes).box
    assert (box[:, :2] >= 0).all()
    assert (box[:, 2:] >= 1).all()
    assert (box[:, :2] + box[:, 2:] <= sizes).all()
    # Corners are inclusive: both ends of the range are reached.
    room = sizes - box[:, 2:]
    assert ((box[:, :2] == room) & (room > 0)).any(axis=0).all()
    assert ((box[:, :2] == 0) & (room > 0)).any(axis=0).all()


def test_drop_scale_rises_over_the_blocks_and_keeps_the_mean():
    n = 20_000
    scale = draw_plan(PlanSpec(drop_path=0.3, depth=4), 0, 0, np.arange(n), sizes_of(n)).drop_scale
    assert (scale[:, :2] == 1.0).all()
    rates = np.repeat([0.0, 0.1, 0.2, 0.3], 2)
    for column, rate in zip(scale.T, rates, strict=True):
        assert set(np.unique(column)) <= {np.float32(0.0), np.float32(1.0 / (1.0 - rate))}
        error = sqrt(rate * (1.0 - rate) / n)
        assert abs((column == 0.0).mean() - rate) <= 6.0 * error  # 6 sigma: 2e-9 a column
    dropped = (scale[:, 2:] == 0.0).astype(float)
    correlation = np.corrcoef(dropped, rowvar=False) - np.eye(6)
    assert np.abs(correlation).max() < 6.0 / sqrt(n)


def test_drop_scale_is_keyed_by_block():
    deep, shallow = (
        draw_plan(
            PlanSpec(drop_path=0.5, depth=depth), 0, 0, np.arange(2000), sizes_of(2000)
        ).drop_scale
        for depth in (5, 3)
    )
    # The same number decides about a block at any depth; a higher rate drops a superset.
    assert ((shallow[:, 2:4] == 0.0) >= (deep[:, 2:4] == 0.0)).all()


def test_no_drop_path_means_no_array():
    assert draw_plan(PlanSpec(depth=12), 0, 0, [1], [[5, 5]]).drop_scale is None


def test_an_empty_batch_is_a_plan():
    plan = draw_plan(FULL, 0, 0, np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.int64))
    assert isinstance(plan, Plan)
    assert {len(part) for part in plan if part is not None} == {0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be 0 < low <= high <= 1"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio must be 0 < low <= high"),
        ({"flip": 1.1}, r"flip must be a probability in \[0, 1\], got 1.1"),
        ({"jitter": (0.4, -0.1, 0.4)}, "jitter must be three strengths >= 0"),
        ({"jitter": (0.4, 0.4)}, "jitter must be three strengths"),
        ({"drop_path": 1.0, "depth": 2}, r"drop_path must lie in \[0, 1\), got 1.0"),
        ({"drop_path": 0.1}, "depth must be the number of blocks when drop_path is 0.1, got 0"),
    ],
)
def test_impossible_specs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PlanSpec(**changes)


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(3, 2\)"):
        draw_plan(PlanSpec(), 0, 0, [0, 1], sizes_of(3))
    with pytest.raises(ValueError, match=r"at least 1x1, got \(0, 7\) for sample 12"):
        draw_plan(PlanSpec(), 0, 0, [11, 12], [[4, 4], [0, 7]])


def test_a_batch_is_drawn_without_python_loops_over_images():
    # 256 images take 5 ms on one core (benchmarks/test_plan.py); loops over images, over 300 ms.
    sizes, index = sizes_of(256), np.arange(256)
    seconds = []
    for epoch in range(5):
        start = time.perf_counter()
        draw_plan(PlanSpec(mask=MaskSpec(), drop_path=0.1, depth=12), 0, epoch, index, sizes)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.060
