"""Masks: which patches of each image are hidden from the student.

``"block"`` is BEiT's blockwise masking (arXiv 2106.08254, algorithm 1, with the bounds of the
released code): rectangles of random area and aspect are laid over the grid until ``target`` patches
are hidden or ten proposals in a row do not fit. So ``target`` is the most, not always the number:
at 75 of 14x14 the mean is 74.47, and two images of three reach 75. The rest of the ``target``
mask slots stay empty, which keeps every shape static.

The loop runs over rectangles, never over images: the ten proposals for the next rectangle of all
images are judged at once, with the number of patches already hidden read off a summed-area table.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbeit.data.philox import Stream, random_words, uniforms

PROPOSALS = 10
"""Proposals for one rectangle; when none fits, the image is finished."""


@dataclass(frozen=True)
class MaskSpec:
    """How masks are drawn.

    Attributes:
        grid: patches (rows, columns).
        target: patches to hide at most; also the number of mask slots M.
        min_block: least area of a rectangle, in patches (smaller ones appear only when fewer
            than this remain to be hidden).
        max_block: largest area of a rectangle, in patches; None means ``target``.
        min_aspect: the aspect (height / width) is log-uniform in [min_aspect, 1 / min_aspect].
        strategy: "block", "random" (exactly ``target`` patches, each set equally likely) or "none"
            (no patch is hidden and all slots are empty).

    Raises:
        ValueError: a specification that no mask can satisfy.
    """

    grid: tuple[int, int] = (14, 14)
    target: int = 75
    min_block: int = 16
    max_block: int | None = None
    min_aspect: float = 0.3
    strategy: Literal["block", "random", "none"] = "block"

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows < 1 or columns < 1:
            raise ValueError(f"grid must have at least one row and one column, got {self.grid}")
        if not 1 <= self.target <= rows * columns:
            raise ValueError(
                f"target must lie between 1 and the {rows * columns} patches of a "
                f"{rows}x{columns} grid, got {self.target}"
            )
        match self.strategy:
            case "block":
                self._check_blocks()
            case "random" | "none":
                pass
            case _:
                raise ValueError(
                    f"strategy must be 'block', 'random' or 'none', got {self.strategy!r}"
                )

    def _check_blocks(self) -> None:
        if not 0.0 < self.min_aspect <= 1.0:
            raise ValueError(f"min_aspect must lie in (0, 1], got {self.min_aspect}")
        if not 1 <= self.min_block <= self.target:
            raise ValueError(
                f"min_block must lie between 1 and target = {self.target}, got {self.min_block}"
            )
        if self.max_block is not None and self.max_block < self.min_block:
            raise ValueError(
                f"max_block must be at least min_block = {self.min_block}, got {self.max_block}"
            )
        # Rounded sides must stay below the grid's: side < size - 1/2. The smallest rectangle is
        # the easiest to fit; the aspects that let it fit must meet the aspects that are drawn.
        rows, columns = self.grid
        lowest = max(self.min_aspect, self.min_block / (columns - 0.5) ** 2)
        highest = min(1.0 / self.min_aspect, (rows - 0.5) ** 2 / self.min_block)
        if rows < 2 or columns < 2 or lowest >= highest:
            raise ValueError(
                f"no rectangle of min_block = {self.min_block} patches fits strictly inside a "
                f"{rows}x{columns} grid with min_aspect = {self.min_aspect}: "
                "use a smaller min_block, or strategy='random'"
            )

    @property
    def slots(self) -> int:
        """Mask slots M: the static last dimension of ``positions``."""
        return self.target


def draw_masks(spec: MaskSpec, seed: int, epoch: int, index: ArrayLike) -> NDArray[np.bool_]:
    """Masks of samples ``index`` ``[B]``: bool ``[B, rows, columns]``, True where hidden.

    A pure function of (spec, seed, epoch, index): the same sample gets the same mask in any batch.
    """
    index_B = np.atleast_1d(np.asarray(index))
    match spec.strategy:
        case "block":
            return _draw_blocks(spec, seed, epoch, index_B)
        case "random":
            return _draw_random(spec, seed, epoch, index_B)
        case "none":
            return np.zeros((index_B.size, *spec.grid), dtype=bool)


def mask_positions(masks: NDArray[np.bool_], slots: int) -> NDArray[np.int32]:
    """Hidden patches as numbers in raster order, ascending: int32 ``[B, slots]``, -1 when empty.

    Raises:
        ValueError: a mask hides more than ``slots`` patches.
    """
    flat_BN = masks.reshape(len(masks), masks.shape[1] * masks.shape[2])
    count_B = flat_BN.sum(axis=1)
    if count_B.size and count_B.max() > slots:
        raise ValueError(f"a mask hides {count_B.max()} patches, but there are {slots} slots")
    positions_BM = np.full((len(masks), slots), -1, dtype=np.int32)
    # nonzero lists patches image by image, ascending: exactly the order of the filled slots.
    positions_BM[np.arange(slots) < count_B[:, None]] = np.nonzero(flat_BN)[1]
    return positions_BM


def _draw_random(spec: MaskSpec, seed: int, epoch: int, index_B: NDArray) -> NDArray[np.bool_]:
    rows, columns = spec.grid
    cells = rows * columns
    draws = np.arange(-(-cells // 4))
    words = random_words(seed, epoch, index_B[:, None], Stream.MASK, draws)
    keys_BN = np.stack(words, axis=-1).reshape(len(index_B), 4 * draws.size)[:, :cells]
    # Equal keys (one image in 220,000) are told apart by position: the count stays exact.
    chosen_BM = np.argsort(keys_BN, axis=1, kind="stable")[:, : spec.target]
    masks_BN = np.zeros((len(index_B), cells), dtype=bool)
    np.put_along_axis(masks_BN, chosen_BM, True, axis=1)
    return masks_BN.reshape(len(index_B), rows, columns)


def _draw_blocks(spec: MaskSpec, seed: int, epoch: int, index_B: NDArray) -> NDArray[np.bool_]:
    """A = images still active, P = proposals."""
    rows, columns = spec.grid
    max_block = spec.target if spec.max_block is None else spec.max_block
    masks = np.zeros((len(index_B), rows, columns), dtype=bool)
    count = np.zeros(len(index_B), dtype=np.int64)
    active = np.arange(len(index_B))
    row, column = np.arange(rows), np.arange(columns)
    first_draw = 0
    while active.size:
        draws = first_draw + np.arange(PROPOSALS)
        u_AP = uniforms(seed, epoch, index_B[active, None], Stream.MASK, draws)
        cap_A = np.minimum(spec.target - count[active], max_block)
        # When fewer than min_block remain, the bounds are inverted: areas from cap to min_block.
        area_AP = spec.min_block + (cap_A[:, None] - spec.min_block) * u_AP[0]
        aspect_AP = np.exp(log(spec.min_aspect) * (1.0 - 2.0 * u_AP[1]))
        height_AP = np.rint(np.sqrt(area_AP * aspect_AP)).astype(np.int64)
        width_AP = np.rint(np.sqrt(area_AP / aspect_AP)).astype(np.int64)
        fits_AP = (height_AP < rows) & (width_AP < columns)
        height_AP = np.where(fits_AP, height_AP, 0)
        width_AP = np.where(fits_AP, width_AP, 0)
        top_AP = (u_AP[2] * (rows - height_AP + 1)).astype(np.int64)
        left_AP = (u_AP[3] * (columns - width_AP + 1)).astype(np.int64)
        hidden_AP = _hidden_inside(masks[active], top_AP, left_AP, height_AP, width_AP)
        fresh_AP = height_AP * width_AP - hidden_AP
        good_AP = (fresh_AP > 0) & (fresh_AP <= cap_A[:, None])

        found = np.nonzero(good_AP.any(axis=1))[0]
        pick = (found, good_AP[found].argmax(axis=1))
        active = active[found]
        top, left = top_AP[pick][:, None], left_AP[pick][:, None]
        in_row = (row >= top) & (row < top + height_AP[pick][:, None])
        in_column = (column >= left) & (column < left + width_AP[pick][:, None])
        masks[active] |= in_row[:, :, None] & in_column[:, None, :]
        count[active] += fresh_AP[pick]
        active = active[count[active] < spec.target]
        first_draw += PROPOSALS
    return masks


def _hidden_inside(
    masks_Ahw: NDArray, top: NDArray, left: NDArray, height: NDArray, width: NDArray
) -> NDArray[np.int64]:
    """Hidden patches inside each proposed rectangle, ``[A, P]``."""
    images, rows, columns = masks_Ahw.shape
    table = np.zeros((images, rows + 1, columns + 1), dtype=np.int64)
    np.cumsum(np.cumsum(masks_Ahw, axis=1, dtype=np.int64), axis=2, out=table[:, 1:, 1:])
    flat = table.ravel()
    image = np.arange(images)[:, None] * ((rows + 1) * (columns + 1))
    upper = image + top * (columns + 1)
    lower = upper + height * (columns + 1)
    right = left + width
    return flat[lower + right] - flat[lower + left] - flat[upper + right] + flat[upper + left]
