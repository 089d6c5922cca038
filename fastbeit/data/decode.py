"""Encoded bytes to pixels with PIL: one defined 8-bit RGB (or grey) result for whatever came in.

==================  ============================================================================
EXIF orientation    applied
grey, 1-bit         every channel takes the grey value
palette             looked up
alpha, transparent  dropped, not blended: the stored colour stays
16 bits             round(v / 257); TIFF of 9 to 15 bits by its own range
CMYK                (255 - c)(255 - k) / 255; a JPEG's inks are inverted if it has Adobe's marker
animation           first frame
32-bit, CIELAB      refused: no range, or no conversion, that everybody agrees on
==================  ============================================================================

Truncated and corrupt data are refused with PIL's reason.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFile

from fastbeit.data.header import (
    DEFAULT_MAX_PIXELS,
    BadImage,
    ImageHeader,
    OpenedImage,
    describe,
    open_image,
    quiet_pil,
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# PNG stores 16-bit samples high byte first and PIL keeps only that byte. Asking its unpacker for
# the other byte order gives the low bytes; grey + alpha is taken apart as four 8-bit channels.
_PNG16_LOW_BYTES = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}


def decode_image(
    data: bytes, *, channels: int = 3, max_pixels: int = DEFAULT_MAX_PIXELS
) -> NDArray[np.uint8]:
    """Decode to uint8 ``[H, W, channels]``, turned upright.

    Args:
        data: the whole file.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma of a colour image).
        max_pixels: width x height above this is refused.

    Raises:
        BadImage: what ``inspect_image`` refuses, and pixel data that can't be decoded in full.
    """
    with quiet_pil():
        pixels = np.asarray(decode_opened(open_image(data, max_pixels=max_pixels), data, channels))
    return pixels.reshape(*pixels.shape[:2], channels)


def decode_opened(opened: OpenedImage, data: bytes, channels: int) -> Image.Image:
    """The pixels of an opened image as PIL's RGB or L. Call it inside ``quiet_pil``."""
    header, image = opened
    try:
        pixels = _eight_bits(header, image, data)
        if channels == 1 and pixels.mode not in ("L", "LA", "1"):
            pixels = pixels.convert("RGB")
        mode = "L" if channels == 1 else "RGB"
        if pixels.mode != mode:
            pixels = pixels.convert(mode)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise BadImage(f"{header.format} cannot be decoded: {describe(error)}") from error
    if header.orientation != 1:
        pixels = pixels.transpose(_TURNS[header.orientation])
    if pixels.size != (header.width, header.height):
        raise BadImage(
            f"{header.format} decodes to {pixels.width}x{pixels.height} pixels, "
            f"its header says {header.width}x{header.height}"
        )
    return pixels


def _eight_bits(header: ImageHeader, image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Decoded, 8 bits a channel, no transparency left that a conversion could act on."""
    if header.format == "PNG" and header.bits == 16 and header.mode in ("RGB", "RGBA"):
        return _png16_colour(image, data)
    image.load()
    image.info.pop("transparency", None)
    mode = image.mode
    if (mode == "I" and header.format != "PPM") or mode in ("F", "LAB"):
        raise BadImage(f"{header.format} of mode {mode} has no defined 8-bit RGB; convert it")
    if mode.startswith("I"):  # I;16 in any byte order; PIL gives 16-bit PGM as 32-bit integers
        bits = header.bits if header.format == "TIFF" else 16
        return _scaled(np.asarray(image).astype(np.uint32), 2**bits - 1)
    if mode == "CMYK" and header.format in ("JPEG", "MPO") and "adobe" not in image.info:
        return ImageChops.invert(image)  # PIL takes every CMYK JPEG for Adobe's inverted kind
    return image


def _png16_colour(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """A 16-bit colour PNG (or grey with alpha), both bytes of every sample used."""
    raw_mode = _raw_mode(image)
    if raw_mode == "LA;16B":
        _set_raw_mode(image, "RGBA")  # high and low byte of grey, then of alpha
        image.load()
        high_low = np.asarray(image).astype(np.uint32)
        return _scaled(high_low[..., 0] << 8 | high_low[..., 1], 65535)
    if raw_mode not in _PNG16_LOW_BYTES:
        raise BadImage(f"16-bit PNG of an unknown pixel layout {raw_mode!r}")
    low = Image.open(io.BytesIO(data), formats=("PNG",))
    _set_raw_mode(low, _PNG16_LOW_BYTES[raw_mode])
    low.load()
    image.load()
    high_HWC = np.asarray(image)[..., :3].astype(np.uint32)
    return _scaled(high_HWC << 8 | np.asarray(low)[..., :3], 65535)


def _raw_mode(image: ImageFile.ImageFile) -> str:
    args = image.tile[0].args
    return args if isinstance(args, str) else str(args[0] if args else None)


def _set_raw_mode(image: ImageFile.ImageFile, raw_mode: str) -> None:
    tile = image.tile[0]
    args = (raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode
    image.tile = [tile._replace(args=args)]


def _scaled(values: NDArray[np.integer], full: int) -> Image.Image:
    """[0, full] to [0, 255], rounded to nearest."""
    return Image.fromarray(((values * 255 + full // 2) // full).clip(0, 255).astype(np.uint8))
