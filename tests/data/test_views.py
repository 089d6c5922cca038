"""Views: the golden pixels, and PIL's own operators applied one by one to the full image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from safetensors import safe_open
from safetensors.numpy import load_file

from fastbeit.data import MaskSpec, PlanSpec, draw_plan
from fastbeit.data.plan import Plan
from fastbeit.data.views import ViewSpec, draw_views, finish_views, jitter

GOLDEN = Path(__file__).parent.parent / "golden" / "two_views.safetensors"


def metadata(key):
    with safe_open(GOLDEN, "np") as file:
        return json.loads(file.metadata()[key])


def plan_of(boxes, flip=None, factors=None, order=None):
    count = len(boxes)
    return Plan(
        np.arange(count),
        np.array(boxes, np.int32),
        np.zeros(count, bool) if flip is None else np.array(flip),
        np.ones((count, 3), np.float32) if factors is None else np.array(factors, np.float32),
        np.tile(np.array([0, 1, 2], np.uint8), (count, 1)) if order is None else np.array(order),
        np.zeros((count, 1), np.int32),
        None,
    )


def test_golden_crops_are_equal():
    golden = load_file(GOLDEN)
    image = Image.fromarray(golden["image"])
    boxes = metadata("boxes_top_left_height_width")
    for row in range(len(boxes)):
        student, tokens = draw_views(image, plan_of(boxes), row, ViewSpec())
        assert np.array_equal(student, golden[f"box{row}.patches_bicubic_224"])
        assert np.array_equal(tokens, golden[f"box{row}.tokens_lanczos_112"])


def test_golden_jitter_is_equal():
    golden = load_file(GOLDEN)
    rows = metadata("jitter_brightness_contrast_saturation_order")
    for number, (brightness, contrast, saturation, order) in enumerate(rows):
        factors = np.array([brightness, contrast, saturation], np.float32).tolist()
        got = jitter(Image.fromarray(golden["image"]), factors, order)
        assert np.array_equal(got, golden[f"jitter{number}"])


def test_golden_token_range():
    golden = load_file(GOLDEN)
    tokens = golden["box0.tokens_lanczos_112"][None]
    _, mapped = finish_views(tokens, tokens, ViewSpec(), "cpu")
    expected = torch.from_numpy(golden["box0.tokens_mapped"])
    torch.testing.assert_close(mapped[0], expected, atol=1.2e-7, rtol=0)


ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@pytest.mark.parametrize("shape", [(61, 83), (300, 180), (1, 1), (3, 200)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_shortcuts_change_nothing(photo, shape, mode):
    """Early crop, mirrored box and look-up tables against the plain way."""
    image = Image.fromarray(photo(*shape)).convert(mode)
    sizes = np.tile(np.array(shape), (60, 1))
    plan = draw_plan(PlanSpec(mask=MaskSpec()), 3, 1, np.arange(60), sizes)
    plan.jitter[::7, 1] = 1  # without contrast the crop comes first
    plan.jitter[::11] = 1
    views = ViewSpec(size=(20, 24), token_size=(10, 12), channels=3)
    assert len({tuple(order) for order in plan.jitter_order.tolist()}) == 6
    for row in range(60):
        plain = image
        for step in plan.jitter_order[row].tolist():
            plain = ENHANCE[step](plain).enhance(float(plan.jitter[row, step]))
        if plan.flip[row]:
            plain = plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        top, left, height, width = plan.box[row].tolist()
        plain = plain.crop((left, top, left + width, top + height))
        student, tokens = draw_views(image, plan, row, views)
        rows = plain.resize((24, height), Image.Resampling.BICUBIC)
        assert np.array_equal(student, rows.resize((24, 20), Image.Resampling.BICUBIC))
        rows = plain.resize((12, height), Image.Resampling.LANCZOS)
        assert np.array_equal(tokens, rows.resize((12, 10), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("channels", [1, 3])
def test_finished_views(channels):
    views = ViewSpec(size=(6, 8), token_size=(3, 4), channels=channels, token_scale=2.0)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (5, 6, 8, channels), np.uint8)
    tokens = random.integers(0, 256, (5, 3, 4, channels), np.uint8)
    got, got_tokens = finish_views(images, torch.from_numpy(tokens), views, "cpu")
    mean, std = np.array(views.mean[:channels]), np.array(views.std[:channels])
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=5e-7)
    expected = (tokens / 255 * 2 + 0.1).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got_tokens.numpy(), expected, rtol=0, atol=5e-7)
    assert got.shape == (5, channels, 6, 8) and got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    half, _ = finish_views(images, tokens, views, "cpu", torch.bfloat16)
    assert torch.equal(half, got.to(torch.bfloat16))
    assert half.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (224, 0)}, r"size must be \(height, width\).*got \(224, 0\)"),
        ({"resample": "nearest"}, "resample must be one of bilinear, bicubic, lanczos"),
        ({"channels": 4}, r"channels must be 3 \(RGB\) or 1 \(grey\), got 4"),
        ({"mean": (0.5,)}, "a value for each of 3 channels"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be positive"),
    ],
)
def test_impossible_views_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ViewSpec(**change)
