"""Pixels as ``data:`` addresses, so that the page needs no other file."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

# Small pictures are drawn at least this wide, with visible pixels, not blurred.
SHOWN_SIDE = 224
_HATCH_LIGHT, _HATCH_DARK = 150, 120


def data_address(pixels: np.ndarray) -> str:
    """uint8 ``[H, W, C]``, C 1 or 3, as a PNG (small) or JPEG (photograph) address."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    kind = "PNG" if max(image.size) <= SHOWN_SIDE // 2 or _is_flat(pixels) else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 88}))
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{kind.lower()};base64,{text}"


def hide_patches(pixels: np.ndarray, positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The image, enlarged if small, with a hatched grey over the masked patches.

    Args:
        pixels: uint8 ``[H, W, C]``.
        positions: ``[M]`` masked patches in raster order, -1 in empty slots.
        grid: patches down and across.
    """
    zoom = max(1, SHOWN_SIDE // pixels.shape[1])
    shown = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
    height, width = shown.shape[:2]
    # Hatched, because plain grey might be part of a picture.
    row, column = np.mgrid[:height, :width]
    stripe = (row + column) % 8 < 4
    hatch = np.where(stripe, _HATCH_LIGHT, _HATCH_DARK).astype(np.uint8)[..., None]
    hidden = np.zeros(grid[0] * grid[1], dtype=bool)
    hidden[positions[positions >= 0]] = True
    down, across = height // grid[0], width // grid[1]
    hidden_HW = hidden.reshape(grid).repeat(down, axis=0).repeat(across, axis=1)
    return np.where(hidden_HW[..., None], hatch, shown)


def _is_flat(pixels: np.ndarray) -> bool:
    """Few colours (an enlarged small picture): PNG is smaller and exact."""
    return len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) <= 512
