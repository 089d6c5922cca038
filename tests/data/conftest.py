"""Photo-like images and files of every kind that the loaders must agree on."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image


def _photo(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 ``[height, width, channels]``: smooth shapes with a little noise, from a fixed seed."""
    random = np.random.default_rng(seed)
    planes = []
    for _ in range(channels):
        coarse = random.integers(0, 256, (max(2, height // 16), max(2, width // 16)), np.uint8)
        plane = np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        )
        planes.append(plane + random.normal(0, 6, plane.shape))
    return np.stack(planes, axis=-1).round().clip(0, 255).astype(np.uint8)


def _encode(pixels: NDArray | Image.Image, kind: str, **options: object) -> bytes:
    """A file with these pixels (``[H, W, C]`` or ``[H, W]``), as PIL writes it."""
    if isinstance(pixels, np.ndarray):
        pixels = Image.fromarray(pixels.squeeze())
    file = io.BytesIO()
    pixels.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def _png16(values: NDArray[np.uint16]) -> bytes:
    """A 16-bit PNG of ``[H, W, C]``, written by hand: 1, 2 (with alpha), 3 or 4 channels."""
    height, width, channels = values.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return _png_file([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def _png_file(chunks: list[tuple[bytes, bytes]]) -> bytes:
    file = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        file += struct.pack(">I", len(body)) + kind + body + checksum
    return file


def _oriented(pixels: NDArray[np.uint8], kind: str, orientation: int, **options: object) -> bytes:
    """A file whose EXIF says that it has to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _encode(pixels, kind, exif=exif if kind == "TIFF" else exif.tobytes(), **options)


def _zoo() -> dict[str, bytes]:
    """A file of every kind, all readable: name to bytes."""
    rgb, odd = _photo(61, 83, seed=1), _photo(47, 33, seed=2)
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    palette = Image.fromarray(rgb).quantize(200)
    wide = (_photo(40, 52, 4, seed=3).astype(np.uint16) * 257) ^ 0x35
    zoo = {
        "jpeg_444.jpg": _encode(rgb, "JPEG", quality=92, subsampling=0),
        "jpeg_420.jpg": _encode(rgb, "JPEG", quality=80, subsampling=2),
        "jpeg_odd_progressive.jpg": _encode(odd, "JPEG", progressive=True),
        "jpeg_grey.jpg": _encode(grey, "JPEG"),
        "jpeg_cmyk.jpg": _encode(Image.fromarray(_photo(50, 64, 4), "CMYK"), "JPEG", quality=95),
        "jpeg_tiny.jpg": _encode(_photo(3, 5), "JPEG", quality=95),
        "jpeg_wide.jpg": _encode(_photo(9, 400, seed=4), "JPEG", quality=95),
        "png_tall.png": _encode(_photo(380, 7, seed=5), "PNG"),
        "png_one_pixel.png": _encode(_photo(1, 1), "PNG"),
        "png_rgb.png": _encode(odd, "PNG"),
        "png_grey.png": _encode(grey, "PNG"),
        "png_one_bit.png": _encode(Image.fromarray(grey).convert("1"), "PNG"),
        "png_palette.png": _encode(palette, "PNG"),
        "png_palette_transparent.png": _encode(palette, "PNG", transparency=bytes(range(200))),
        "png_rgb_transparent.png": _encode(rgb, "PNG", transparency=tuple(rgb[0, 0].tolist())),
        "png_rgba.png": _encode(_photo(61, 83, 4, seed=6), "PNG"),
        "png_grey_alpha.png": _encode(Image.fromarray(_photo(61, 83, 2), "LA"), "PNG"),
        "png_grey_16.png": _png16(wide[..., :1]),
        "png_grey_alpha_16.png": _png16(wide[..., :2]),
        "png_rgb_16.png": _png16(wide[..., :3]),
        "png_rgba_16.png": _png16(wide),
        "tiff_grey_16.tif": _encode(wide[..., 0], "TIFF"),
        "tiff_lzw.tif": _encode(rgb, "TIFF", compression="tiff_lzw"),
        "webp_lossy.webp": _encode(rgb, "WEBP", quality=80),
        "webp_alpha.webp": _encode(_photo(40, 30, 4), "WEBP", lossless=True),
        "gif.gif": _encode(palette, "GIF", transparency=3),
        "bmp.bmp": _encode(odd, "BMP"),
    }
    for orientation in range(1, 9):
        zoo[f"jpeg_turn_{orientation}.jpg"] = _oriented(rgb, "JPEG", orientation, quality=90)
        zoo[f"png_turn_{orientation}.png"] = _oriented(odd, "PNG", orientation)
    # Orientation as a 32-bit number: PIL and viewers take it, DALI 2.4 leaves the image lying.
    long = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\4\0\0\0\1\0\0\0\6\0\0\0\0"
    zoo["jpeg_turn_as_long.jpg"] = _encode(rgb, "JPEG", exif=long)
    zoo["webp_turn_6.webp"] = _oriented(rgb, "WEBP", 6, lossless=True)
    zoo["tiff_turn_6.tif"] = _oriented(rgb, "TIFF", 6)
    return zoo


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def photo() -> Callable[..., NDArray[np.uint8]]:
    return _photo


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    return _encode


@pytest.fixture(scope="session")
def png16() -> Callable[..., bytes]:
    return _png16


@pytest.fixture(scope="session")
def png_file() -> Callable[..., bytes]:
    return _png_file


@pytest.fixture(scope="session")
def oriented() -> Callable[..., bytes]:
    return _oriented


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    return _write


@pytest.fixture(scope="session")
def zoo() -> dict[str, bytes]:
    return _zoo()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small photos, JPEG and PNG."""
    files = {}
    for number in range(24):
        pixels = _photo(36 + number, 60 - number, seed=number)
        kind = "PNG" if number % 3 == 0 else "JPEG"
        files[f"{number:02}.{'png' if kind == 'PNG' else 'jpg'}"] = _encode(pixels, kind)
    return _write(tmp_path_factory.mktemp("photos"), files)
