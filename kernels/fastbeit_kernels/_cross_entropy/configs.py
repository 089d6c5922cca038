"""Launch choices of the masked loss as frozen data, one entry a GPU family and element size.

``source`` as in ``_configs.py``. Numbers of programs are frozen too: each keeps sums of its own, so
they decide in which order a sum is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._configs import COMPILED


@dataclass(frozen=True)
class LossConfig:
    """``whole_row``: the most classes, padded to a power of two, whose row lies in registers.

    ``maxnreg``: cap on the registers of a thread there, so that two blocks of 256 threads share a
    multiprocessor; None where the code doesn't fit under it.
    ``programs``: pieces that the rows are cut into, at most, and so partial results of the loss
    and, of whole rows, of dbias (V fp32 numbers each, written and read once more). Where a program
    has fewer warps than 8 there are as many programs more.
    ``pieces``: the same for dbias of longer rows, which has as many programs a block of classes.
    """

    programs: int
    whole_row: int
    maxnreg: int | None
    pieces: int
    source: str = COMPILED


# Programs are two rounds of the multiprocessors of an H100 (132), a B200 (148), an A100 (108). With
# 16,384 classes a block has 512 threads, and so 128 registers each, cap or not.
HOPPER = LossConfig(programs=264, whole_row=16384, maxnreg=128, pieces=16)
HOPPER_FP32 = LossConfig(programs=264, whole_row=8192, maxnreg=None, pieces=16)
# sm_100: 122 registers without a cap, and two blocks.
BLACKWELL = LossConfig(programs=296, whole_row=8192, maxnreg=None, pieces=16)
AMPERE = LossConfig(programs=216, whole_row=16384, maxnreg=128, pieces=16)
AMPERE_FP32 = LossConfig(programs=216, whole_row=8192, maxnreg=None, pieces=16)

LOSS: dict[tuple[str, int], LossConfig] = {
    (family, bits): config
    for family, half, single in (
        ("sm_80", AMPERE, AMPERE_FP32),
        ("sm_86", AMPERE, AMPERE_FP32),
        ("sm_90", HOPPER, HOPPER_FP32),
        ("sm_100", BLACKWELL, BLACKWELL),
    )
    for bits, config in ((16, half), (32, single))
}

# The same for every family.
# Elements of a whole row that a thread holds: four loads of 16 bytes at 16 bits.
WHOLE_ELEMENTS = 32
# Narrow rows are taken together until a tile has this many elements, or this many rows; a thread
# holds half as many, since it has numbers of several rows beside them. 1,000 classes, bf16, sm_90:
# 80 registers, smoothed 96; by 32 elements 133, smoothed 128 and 8 bytes of stack.
WHOLE_TILE, WHOLE_ROWS, NARROW_ELEMENTS = 2048, 4, 16
# First and second pass over longer rows: classes of a block; of the first warps and stages too, of
# the second rows.
FIRST_BLOCK, FIRST_WARPS, FIRST_STAGES = 4096, 8, 3
SECOND_BLOCK, SECOND_ROWS = 1024, 4
# Gather and scatter: rows and columns of a tile, slots looked through at a time, warps.
ROWS, COLUMNS, SLOTS, ROW_WARPS = 8, 256, 128, 4
# Sums of partials: partials and columns of a tile. 8,192 columns are 128 programs, one a
# multiprocessor of an H100.
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 64, 64, 4
SCALE_BLOCK, SCALE_WARPS = 2048, 4


def second_warps(element_bytes: int) -> int:
    """Of the second pass: a row of the block to all threads, 16 bytes each.

    So 4 warps at 16 bits (114 registers on sm_90, by Triton 3.7.1) and 8 in fp32 (77). By 8 warps
    16 bits take 128; by 4 fp32 takes 136, and Triton 3.9.0 spills 8 bytes on sm_100.
    """
    return max(1, SECOND_BLOCK * element_bytes // (16 * 32))
