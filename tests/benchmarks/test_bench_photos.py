"""Photographs of ImageNet's size, cut from whatever large one is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import photos

PRECISE = 0.15
"""Of the mean size that is aimed at: JPEG qualities come in steps."""


def large_photograph(path: Path) -> Path:
    """Left half noisy, right half flat, 1500x750."""
    random = np.random.default_rng(0)
    pixels = np.full((750, 1500, 3), 128, np.uint8)
    pixels[:, :750] = random.integers(0, 256, (750, 750, 3), np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    return path


def test_a_texture_stands_in_where_there_is_no_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(photos.VARIABLE, raising=False)
    monkeypatch.setattr(photos, "BLUE_MARBLE", "no/such/file.jpg")
    made = photos.make_photos(tmp_path, 3)
    files = sorted(tmp_path.iterdir())
    assert made.kind == "synthetic texture" and len(files) == 3
    assert made.mean_bytes == sum(file.stat().st_size for file in files) / 3
    assert made.mean_bytes == pytest.approx(photos.MEAN_BYTES, rel=PRECISE)
    shown = []
    for file in files:
        with Image.open(file) as image:
            assert image.size == (500, 375) and image.format == "JPEG"
            shown.append(np.asarray(image))
    assert not np.array_equal(shown[0], shown[1])


def test_a_named_photograph_is_cut_where_its_detail_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = large_photograph(tmp_path / "large.jpg")
    monkeypatch.setenv(photos.VARIABLE, str(path))
    (tmp_path / "cut").mkdir()
    assert photos.make_photos(tmp_path / "cut", 2).kind == "large.jpg"
    for file in (tmp_path / "cut").iterdir():
        with Image.open(file) as image:
            assert np.asarray(image).std() > 30  # none of the flat half
    with pytest.raises(ValueError, match="too few for 16 tiles"):
        photos.cut(path, 16)


def test_a_photograph_that_is_not_there_is_no_texture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(photos.VARIABLE, str(tmp_path / "none.jpg"))
    with pytest.raises(FileNotFoundError, match="which is no file"):
        photos.make_photos(tmp_path, 2)


def test_tiles_overlap_by_half_and_stay_inside() -> None:
    boxes = list(photos.tile_boxes((1000, 750)))
    assert boxes[0] == (0, 0, 500, 375) and boxes[1][0] == 250
    assert max(right for *_, right, _ in boxes) <= 1000
    assert max(box[3] for box in boxes) <= 750
    assert len(set(boxes)) == len(boxes) == 9
