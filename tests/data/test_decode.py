"""Decoding: what each kind of file becomes, against values worked out here."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastbeit.data.decode import decode_image
from fastbeit.data.header import BadImage

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def luma(rgb):
    red, green, blue = (rgb[..., channel].astype(np.int64) for channel in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16)[..., None]


def thrice(grey):
    return np.repeat(grey.reshape(*grey.shape[:2], 1), 3, axis=2)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_upright(photo, oriented, kind, orientation):
    pixels = photo(20, 31)
    options = {"lossless": True} if kind == "WEBP" else {}
    got = decode_image(oriented(pixels, kind, orientation, **options))
    assert got.dtype == np.uint8
    assert np.array_equal(got, TURNS[orientation](pixels))


def test_lossless_rgb_and_grey_are_kept(photo, encode):
    pixels = photo(17, 23)
    for kind in ("PNG", "BMP", "PPM", "TIFF"):
        assert np.array_equal(decode_image(encode(pixels, kind)), pixels)
        assert np.array_equal(decode_image(encode(pixels[..., 0], kind)), thrice(pixels[..., 0]))


def test_one_channel_is_luma(photo, encode):
    pixels = photo(17, 23)
    assert np.array_equal(decode_image(encode(pixels, "PNG"), channels=1), luma(pixels))
    grey = pixels[..., :1]
    assert np.array_equal(decode_image(encode(grey, "PNG"), channels=1), grey)


def test_alpha_is_dropped_not_blended(photo, encode):
    pixels = photo(17, 23, 4)
    pixels[:, :9, 3] = 0
    assert np.array_equal(decode_image(encode(pixels, "PNG")), pixels[..., :3])
    grey_alpha = Image.fromarray(pixels[..., 2:], "LA")
    assert np.array_equal(decode_image(encode(grey_alpha, "PNG")), thrice(pixels[..., 2]))
    assert np.array_equal(decode_image(encode(grey_alpha, "PNG"), channels=1), pixels[..., 2, None])


def test_palettes_are_looked_up_and_their_transparency_dropped(photo, encode):
    palette = Image.fromarray(photo(17, 23)).quantize(20)
    colours = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
    for transparency in ({}, {"transparency": 0}, {"transparency": bytes(range(20))}):
        for kind in ("PNG", "GIF"):
            if kind == "GIF" and isinstance(transparency.get("transparency"), bytes):
                continue
            assert np.array_equal(decode_image(encode(palette, kind, **transparency)), colours)


def test_the_transparent_colour_of_rgb_stays(photo, encode):
    pixels = photo(17, 23)
    data = encode(pixels, "PNG", transparency=tuple(pixels[3, 4].tolist()))
    assert np.array_equal(decode_image(data), pixels)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_scaled_not_clipped_or_cut(png16, channels):
    values = np.random.default_rng(0).integers(0, 65536, (19, 21, channels), np.uint16)
    values[0, :3] = [[0], [65535], [128]]
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    expected = expected[..., :3] if channels >= 3 else thrice(expected[..., 0])
    assert np.array_equal(decode_image(png16(values)), expected)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "PPM"])
def test_16_bit_grey_in_other_files(encode, kind):
    values = np.random.default_rng(0).integers(0, 65536, (19, 21), np.uint16)
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    assert np.array_equal(decode_image(encode(values, kind)), thrice(expected))


def cmyk_to_rgb(inks):
    inks = inks.astype(np.float64)
    return (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255


def test_cmyk(photo, encode):
    inks = photo(32, 40, 4)
    tiff = decode_image(encode(Image.fromarray(inks, "CMYK"), "TIFF"))
    assert np.abs(tiff - cmyk_to_rgb(inks)).max() <= 1
    adobe = encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in adobe  # PIL writes Adobe's inverted kind
    assert np.abs(decode_image(adobe) - cmyk_to_rgb(inks)).mean() < 2
    # Without the marker the stored values are the inks themselves: the stored are 255 - inks.
    start = adobe.index(b"\xff\xee")
    plain = adobe[:start] + adobe[start + 2 + int.from_bytes(adobe[start + 2 : start + 4], "big") :]
    assert np.abs(decode_image(plain) - cmyk_to_rgb(255 - inks)).mean() < 2


def test_only_the_first_frame_of_an_animation(photo, encode):
    first, second = (Image.fromarray(photo(17, 23, seed=seed)).quantize(30) for seed in (1, 2))
    data = encode(first, "GIF", save_all=True, append_images=[second])
    assert np.array_equal(decode_image(data), np.asarray(first.convert("RGB")))


def test_truncated_and_corrupt_data_are_refused(photo, encode):
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(photo(200, 300), kind)
        for length in (len(data) // 2, len(data) * 9 // 10):
            with pytest.raises(BadImage, match=r"cannot be (decoded|read)") as caught:
                decode_image(data[:length])
            assert "0x" not in caught.value.reason
    png = bytearray(encode(photo(200, 300), "PNG"))
    png[len(png) // 2 : len(png) // 2 + 40] = bytes(40)
    with pytest.raises(BadImage, match="PNG cannot be decoded"):
        decode_image(bytes(png))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_defined_range_are_refused(encode, mode):
    with pytest.raises(BadImage, match=f"mode {mode} has no defined 8-bit RGB"):
        decode_image(encode(Image.new(mode, (4, 4)), "TIFF"))
