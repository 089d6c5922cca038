"""The plan: every random decision about a batch of samples, as arrays, before any pixel is read.

Augmentation of arXiv 2106.08254 (appendix) as released: colour jitter of the full image, horizontal
flip, then one random-resized-crop box shared by the student's and the tokenizer's view. The crop
box follows torchvision's ``RandomResizedCrop``: ten tries, then a centre crop of clamped ratio.

All decisions are a pure function of (seed, epoch, sample index, image size), so loaders of any kind
execute the same plan, and a resume needs nothing but the position. DropPath factors belong here
too: keyed by sample and block, they do not depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbeit.data.masks import MaskSpec, draw_masks, mask_positions
from fastbeit.data.philox import Stream, uniforms

CROP_TRIES = 10
# Row k is the k-th permutation of (brightness, contrast, saturation) = (0, 1, 2).
_ORDERS = np.array(
    [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], dtype=np.uint8
)


@dataclass(frozen=True)
class PlanSpec:
    """What is drawn for each sample.

    Attributes:
        mask: how masks are drawn.
        crop_scale: share of the image's area that the crop box covers, uniform in [low, high].
        crop_ratio: width / height of the box, log-uniform in [low, high].
        flip: probability of a horizontal flip.
        jitter: strengths of brightness, contrast and saturation; a factor is uniform in
            [max(0, 1 - strength), 1 + strength].
        drop_path: probability of dropping a branch of the last block; it rises linearly from 0
            in the first block.
        depth: number of blocks (needed only when drop_path > 0).

    Raises:
        ValueError: a value outside its range.
    """

    mask: MaskSpec = field(default_factory=MaskSpec)
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float] = (0.4, 0.4, 0.4)
    drop_path: float = 0.0
    depth: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.crop_scale[0] <= self.crop_scale[1] <= 1.0:
            raise ValueError(f"crop_scale must be 0 < low <= high <= 1, got {self.crop_scale}")
        if not 0.0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must be 0 < low <= high, got {self.crop_ratio}")
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"flip must be a probability in [0, 1], got {self.flip}")
        if len(self.jitter) != 3 or min(self.jitter) < 0.0:
            raise ValueError(
                "jitter must be three strengths >= 0 (brightness, contrast, saturation), "
                f"got {self.jitter}"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must lie in [0, 1), got {self.drop_path}")
        if self.depth < 0 or (self.drop_path > 0.0 and self.depth == 0):
            raise ValueError(
                f"depth must be the number of blocks when drop_path is {self.drop_path}, "
                f"got {self.depth}"
            )


class Plan(NamedTuple):
    """The decisions about B samples.

    Attributes:
        index: int64 ``[B]``, sample numbers.
        box: int32 ``[B, 4]``, crop box (top, left, height, width) in pixels of the image after
            EXIF orientation **and after the flip**.
        flip: bool ``[B]``.
        jitter: float32 ``[B, 3]``, factors of brightness, contrast, saturation (1 changes nothing).
        jitter_order: uint8 ``[B, 3]``, a permutation of (0, 1, 2) = (brightness, contrast,
            saturation): the order in which they are applied.
        positions: int32 ``[B, M]``, masked patches, ascending, -1 in empty slots.
        drop_scale: float32 ``[B, 2 * depth]``, DropPath factors (0 or 1 / keep) of attention and
            MLP of block 0, of block 1, ...; None when nothing is ever dropped.
    """

    index: NDArray[np.int64]
    box: NDArray[np.int32]
    flip: NDArray[np.bool_]
    jitter: NDArray[np.float32]
    jitter_order: NDArray[np.uint8]
    positions: NDArray[np.int32]
    drop_scale: NDArray[np.float32] | None


def draw_plan(spec: PlanSpec, seed: int, epoch: int, index: ArrayLike, sizes: ArrayLike) -> Plan:
    """Draw the plan of samples ``index`` ``[B]`` whose images are ``sizes`` ``[B, 2]``.

    Args:
        spec: what to draw.
        seed: the run's seed, in [0, 2**64).
        epoch: from 0.
        index: int ``[B]``, sample numbers.
        sizes: int ``[B, 2]``, (height, width) in pixels after EXIF orientation.

    Raises:
        ValueError: shapes that don't belong together, or an image without pixels.
    """
    index_B = np.asarray(index, dtype=np.int64)
    sizes_B2 = np.asarray(sizes, dtype=np.int64)
    if index_B.ndim != 1 or sizes_B2.shape != (index_B.size, 2):
        raise ValueError(
            "index must be [B] and sizes [B, 2] (height, width), got shapes "
            f"{index_B.shape} and {sizes_B2.shape}"
        )
    if sizes_B2.size and sizes_B2.min() < 1:
        at = int(sizes_B2.min(axis=1).argmin())
        raise ValueError(
            f"sizes must be at least 1x1, got {tuple(sizes_B2[at].tolist())} "
            f"for sample {index_B[at]}"
        )
    flip, jitter, order = _draw_colour(spec, seed, epoch, index_B)
    return Plan(
        index=index_B,
        box=draw_boxes(spec, seed, epoch, index_B, sizes_B2),
        flip=flip,
        jitter=jitter,
        jitter_order=order,
        positions=mask_positions(draw_masks(spec.mask, seed, epoch, index_B), spec.mask.slots),
        drop_scale=draw_drop_scale(spec, seed, epoch, index_B),
    )


def draw_boxes(
    spec: PlanSpec, seed: int, epoch: int, index_B: NDArray, sizes_B2: NDArray
) -> NDArray[np.int32]:
    """Random-resized-crop boxes, int32 ``[B, 4]`` (top, left, height, width). K = tries."""
    u_BK = uniforms(seed, epoch, index_B[:, None], Stream.CROP, np.arange(CROP_TRIES))
    rows_B, columns_B = sizes_B2[:, 0], sizes_B2[:, 1]
    low, high = spec.crop_scale
    area_BK = (rows_B * columns_B)[:, None] * (low + (high - low) * u_BK[0])
    log_low, log_high = log(spec.crop_ratio[0]), log(spec.crop_ratio[1])
    ratio_BK = np.exp(log_low + (log_high - log_low) * u_BK[1])
    width_BK = np.rint(np.sqrt(area_BK * ratio_BK)).astype(np.int64)
    height_BK = np.rint(np.sqrt(area_BK / ratio_BK)).astype(np.int64)
    fits_BK: NDArray[np.bool_] = (np.minimum(height_BK, width_BK) > 0) & (
        (height_BK <= rows_B[:, None]) & (width_BK <= columns_B[:, None])
    )
    pick = (np.arange(len(index_B)), fits_BK.argmax(axis=1))
    height_B, width_B = height_BK[pick], width_BK[pick]
    top_B = (u_BK[2][pick] * (rows_B - height_B + 1)).astype(np.int64)
    left_B = (u_BK[3][pick] * (columns_B - width_B + 1)).astype(np.int64)
    drawn_B4 = np.stack([top_B, left_B, height_B, width_B], axis=1)
    centred_B4 = _centre_boxes(rows_B, columns_B, spec.crop_ratio)
    return np.where(fits_BK.any(axis=1, keepdims=True), drawn_B4, centred_B4).astype(np.int32)


def _centre_boxes(
    rows_B: NDArray, columns_B: NDArray, ratio: tuple[float, float]
) -> NDArray[np.int64]:
    """The largest centred box whose width / height lies in ``ratio``, ``[B, 4]``."""
    shape_B = columns_B / rows_B
    height_B = np.where(shape_B < ratio[0], np.rint(columns_B / ratio[0]), rows_B)
    width_B = np.where(shape_B > ratio[1], np.rint(rows_B * ratio[1]), columns_B)
    height_B = np.maximum(height_B, 1).astype(np.int64)
    width_B = np.maximum(width_B, 1).astype(np.int64)
    top_B, left_B = (rows_B - height_B) // 2, (columns_B - width_B) // 2
    return np.stack([top_B, left_B, height_B, width_B], axis=1)


def _draw_colour(
    spec: PlanSpec, seed: int, epoch: int, index_B: NDArray
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.uint8]]:
    """Flip ``[B]``, jitter factors ``[B, 3]`` and their order ``[B, 3]``."""
    u_B2 = uniforms(seed, epoch, index_B[:, None], Stream.COLOUR, np.arange(2))
    flip = u_B2[0][:, 0] < spec.flip
    strength = np.asarray(spec.jitter, dtype=np.float64)
    low, high = np.maximum(0.0, 1.0 - strength), 1.0 + strength
    factors_B3 = low + (high - low) * np.stack([u[:, 0] for u in u_B2[1:]], axis=1)
    order = _ORDERS[(u_B2[0][:, 1] * len(_ORDERS)).astype(np.int64)]
    return flip, factors_B3.astype(np.float32), order


def draw_drop_scale(
    spec: PlanSpec, seed: int, epoch: int, index_B: NDArray
) -> NDArray[np.float32] | None:
    """DropPath factors, float32 ``[B, 2 * depth]``: 1 / keep where kept, else 0; None if unused."""
    if spec.drop_path == 0.0:
        return None
    # One draw (four words) serves two blocks: attention, MLP, attention, MLP.
    draws = np.arange(-(-spec.depth // 2))
    words = uniforms(seed, epoch, index_B[:, None], Stream.DROP_PATH, draws)
    u_BD = np.stack(words, axis=-1).reshape(len(index_B), 4 * draws.size)[:, : 2 * spec.depth]
    keep_D = 1.0 - np.repeat(np.linspace(0.0, spec.drop_path, spec.depth), 2)
    return np.where(u_BD < keep_D, 1.0 / keep_D, 0.0).astype(np.float32)
