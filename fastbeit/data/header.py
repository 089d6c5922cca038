"""What an encoded image claims to be, read from its header before any pixel is decoded.

Both loaders start here: the plan needs the size after EXIF orientation, and bytes that no decoder
should see (empty, not an image, an absurd size) are refused while it is still cheap. Formats are
an allow-list recognised by their first bytes; the file name plays no part. PIL's other plug-ins
never run (one of them starts Ghostscript).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple

from PIL import Image, ImageFile

DEFAULT_MAX_PIXELS = 178_956_970
"""PIL's own limit for an image to be trusted: a quarter of a gigabyte at three bytes a pixel."""

_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 0x0102
_PLUGINS = {
    "WEBP": "PIL.WebPImagePlugin",
    "TIFF": "PIL.TiffImagePlugin",
    "JPEG2000": "PIL.Jpeg2KImagePlugin",
    "AVIF": "PIL.AvifImagePlugin",
    "JPEG": "PIL.JpegImagePlugin",
    "PNG": "PIL.PngImagePlugin",
    "GIF": "PIL.GifImagePlugin",
    "BMP": "PIL.BmpImagePlugin",
    "PPM": "PIL.PpmImagePlugin",
}


class BadImage(ValueError):
    """A sample that can't be used. ``reason`` is one line for the log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ImageHeader(NamedTuple):
    """What the header says.

    Attributes:
        format: JPEG, MPO, PNG, WEBP, GIF, BMP, TIFF, PPM, JPEG2000 or AVIF.
        width, height: in pixels, after EXIF orientation: as the decoded image will be.
        orientation: the EXIF tag, 1 to 8; 1 where absent or invalid.
        mode: PIL's mode of the stored pixels (L, RGB, P, CMYK, I;16, ...).
        bits: bits per channel as stored (1, 2, 4, 8, 12, 16).
    """

    format: str
    width: int
    height: int
    orientation: int
    mode: str
    bits: int


class OpenedImage(NamedTuple):
    """A header together with PIL's lazily opened image, whose pixels are not decoded yet."""

    header: ImageHeader
    image: ImageFile.ImageFile


@contextmanager
def quiet_pil() -> Iterator[None]:
    """PIL without its warnings and without its own size limit; ours (``max_pixels``) rules.

    Both are process-wide settings, restored on leaving. Entering costs microseconds, so loaders
    enter once a batch.
    """
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def inspect_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageHeader:
    """The header of an encoded image; no pixel is decoded.

    Args:
        data: the whole file.
        max_pixels: width x height above this is refused.

    Raises:
        BadImage: empty, not a known image format, a broken header, or an absurd size.
    """
    with quiet_pil():
        return open_image(data, max_pixels=max_pixels).header


def open_image(data: bytes, *, max_pixels: int) -> OpenedImage:
    """As ``inspect_image``, with the opened image. Call it inside ``quiet_pil``."""
    kind = _sniff(data)
    try:
        import_module(_PLUGINS[kind])
        image = Image.open(io.BytesIO(data), formats=(kind,))
        header = _header(image, data)
    except MemoryError:
        raise
    except Exception as error:  # PIL's plug-ins raise nearly anything on broken headers
        raise BadImage(f"{kind} header cannot be read: {describe(error)}") from error
    if header.width < 1 or header.height < 1:
        raise BadImage(f"{kind} header claims {header.width}x{header.height} pixels")
    if header.width * header.height > max_pixels:
        raise BadImage(
            f"{kind} header claims {header.width}x{header.height} pixels, "
            f"more than the limit of {max_pixels:,}"
        )
    return OpenedImage(header, image)


def describe(error: BaseException) -> str:
    """An exception as one short line, without memory addresses."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if "object at 0x" not in text else type(error).__name__


def _sniff(data: bytes) -> str:
    """The format by its first bytes (file signatures as each format's specification gives)."""
    head = bytes(data[:16])
    if not head:
        raise BadImage("empty file (0 bytes)")
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:2] == b"BM":
        return "BMP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    if head[:12] == b"\0\0\0\x0cjP  \r\n\x87\n" or head[:4] == b"\xff\x4f\xff\x51":
        return "JPEG2000"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    raise BadImage(f"not an image in a known format: it begins with {head[:8]!r}")


def _header(image: ImageFile.ImageFile, data: bytes) -> ImageHeader:
    width, height = image.size
    kind = image.format or "unknown"
    orientation = 1
    if kind == "TIFF":
        # PIL's TIFF plug-in reports the oriented size and turns the pixels itself.
        bits = max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE_TAG, (8,)))
    else:
        bits = 16 if image.mode.startswith("I") else 8
        orientation = _orientation(image, data)
        if kind == "PNG":
            bits = data[24]  # IHDR always comes first
        if orientation >= 5:
            width, height = height, width
    return ImageHeader(kind, width, height, orientation, image.mode, bits)


def _orientation(image: ImageFile.ImageFile, data: bytes) -> int:
    """The EXIF orientation. A block that cannot be parsed means none, as for every viewer."""
    block = image.info.get("exif")
    if block is None and image.format == "PNG":
        # An eXIf chunk may follow the pixels, where PIL would decode them all to reach it.
        at = data.find(b"eXIf", 33)
        if at > 0:
            block = data[at + 4 : at + 4 + int.from_bytes(data[at - 4 : at], "big")]
    if not block:
        return 1
    try:
        exif = Image.Exif()
        exif.load(block)
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1
