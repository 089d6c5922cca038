"""Launch choices of the masked loss as frozen data, one entry a GPU family.

``source`` as in ``_configs.py``. Programs are a frozen number too, because each keeps sums of its
own: they decide in which order a sum is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._configs import COMPILED


@dataclass(frozen=True)
class LossConfig:
    """``whole_row``: most classes, padded to a power of two, of a row that lies in registers.

    ``programs``: pieces that the rows are cut into, at most, and so partial results of the loss
    and of dbias (V fp32 numbers each, written and read once more).
    ``stages``: rows in flight to shared memory, the one that is computed included.
    ``pieces``: the same as programs for the second pass over tiled rows, which has as many programs
    for each block of classes.
    """

    programs: int
    whole_row: int
    stages: int
    pieces: int
    source: str = COMPILED


HOPPER = LossConfig(programs=264, whole_row=16384, stages=2, pieces=16)
BLACKWELL = LossConfig(programs=296, whole_row=16384, stages=2, pieces=16)
AMPERE = LossConfig(programs=216, whole_row=16384, stages=2, pieces=16)

LOSS: dict[str, LossConfig] = {
    "sm_80": AMPERE,
    "sm_86": AMPERE,
    "sm_90": HOPPER,
    "sm_100": BLACKWELL,
}

# The same for every family.
# Elements of a row that a thread holds: 32, four loads of 16 bytes at 16 bits.
WHOLE_ELEMENTS = 32
# Narrow rows are taken together until a tile has this many elements, or this many rows.
WHOLE_TILE, WHOLE_ROWS = 4096, 16
# First and second pass over tiled rows: classes of a block, rows of it, warps.
FIRST_BLOCK, FIRST_WARPS, FIRST_STAGES = 4096, 8, 3
SECOND_BLOCK, SECOND_ROWS, SECOND_WARPS = 1024, 4, 4
# Gather and scatter: rows and columns of a tile, slots looked through at a time, warps.
ROWS, COLUMNS, SLOTS, ROW_WARPS = 8, 256, 128, 4
# Sums of partials: partials and columns of a tile. Narrow tiles, because there are few columns.
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 64, 32, 4
SCALE_BLOCK, SCALE_WARPS = 2048, 4
