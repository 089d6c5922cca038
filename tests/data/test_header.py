"""Headers: sizes after orientation, and everything that is refused before it is decoded."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastbeit.data.header import BadImage, ImageHeader, inspect_image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_upright_image(photo, oriented, kind, orientation):
    header = inspect_image(oriented(photo(20, 30), kind, orientation))
    upright = (30, 20) if orientation < 5 else (20, 30)
    assert (header.format, (header.width, header.height)) == (kind, upright)
    if kind != "TIFF":  # PIL turns TIFF itself
        assert header.orientation == orientation


def test_every_known_format_is_recognised_by_its_content(photo, encode):
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"):
        header = inspect_image(encode(photo(20, 30), kind))
        assert (header.format, header.width, header.height) == (kind, 30, 20)


def test_mode_and_bits(photo, encode, png16):
    assert inspect_image(encode(photo(4, 5), "PNG")) == ImageHeader("PNG", 5, 4, 1, "RGB", 8)
    wide = photo(4, 5, 4).astype("uint16") * 257
    assert inspect_image(png16(wide[..., :1])).bits == 16
    assert inspect_image(png16(wide)).bits == 16
    assert inspect_image(encode(wide[..., 0], "TIFF")).bits == 16
    assert inspect_image(encode(Image.new("1", (9, 3)), "PNG")).bits == 1


def test_an_exif_block_after_the_pixels_counts(photo, oriented):
    data = oriented(photo(20, 30), "PNG", 6)
    at = data.index(b"eXIf") - 4
    end = at + 12 + struct.unpack(">I", data[at : at + 4])[0]
    moved = data[:at] + data[end:-12] + data[at:end] + data[-12:]
    assert inspect_image(moved).orientation == 6


def test_broken_exif_means_upright_and_warns_of_nothing(photo, encode):
    header = inspect_image(encode(photo(20, 30), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    assert (header.orientation, header.width) == (1, 30)


def test_pixels_are_not_read(photo, encode):
    for kind in ("JPEG", "PNG"):
        data = encode(photo(200, 300), kind)
        assert inspect_image(data[: len(data) // 2]).width == 300


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, this is text saved as .jpg", "not an image in a known format"),
        (b"<!DOCTYPE html><html>", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (b"\x80\x04\x95pickle", "not an image in a known format"),
        (b"\xff\xd8\xff\xe0", "JPEG header cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "PNG header cannot be read"),
        (b"GIF89a", "GIF header cannot be read"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "WEBP header cannot be read"),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(data, reason):
    with pytest.raises(BadImage, match=reason) as caught:
        inspect_image(data)
    assert "\n" not in caught.value.reason and "0x" not in caught.value.reason


def absurd(png_file, width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png_file([(b"IHDR", header), (b"IDAT", b"x"), (b"IEND", b"")])


def test_absurd_sizes_are_refused_without_memory(png_file):
    tracemalloc.start()
    with pytest.raises(BadImage, match=r"60000x60000 pixels, more than the limit of 178,956,970"):
        inspect_image(absurd(png_file, 60_000, 60_000))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_no_pixels_are_refused(png_file):
    with pytest.raises(BadImage):
        inspect_image(absurd(png_file, 0, 7))


def test_the_limit_is_a_parameter_above_and_below_pils_own(png_file):
    limit = Image.MAX_IMAGE_PIXELS
    assert inspect_image(absurd(png_file, 20_000, 20_000), max_pixels=400_000_000).width == 20_000
    assert inspect_image(absurd(png_file, 10, 10), max_pixels=100).width == 10
    with pytest.raises(BadImage, match="limit of 99"):
        inspect_image(absurd(png_file, 10, 10), max_pixels=99)
    assert Image.MAX_IMAGE_PIXELS == limit


@given(st.data())
def test_damaged_headers_raise_nothing_else(zoo, data):
    file = bytearray(zoo[data.draw(st.sampled_from(sorted(zoo)))][:400])
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(file) - 1), st.integers(0, 255)), max_size=8)
    ):
        file[place] = value
    try:
        header = inspect_image(bytes(file))
    except BadImage:
        return
    assert header.width >= 1 and header.height >= 1
