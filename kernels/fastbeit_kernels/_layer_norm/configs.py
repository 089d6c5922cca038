"""Launch choices of the row kernels as frozen data, one entry a GPU family.

Both kernels are bound by memory: what counts is how many bytes a multiprocessor has on their way.
With a latency of 1 us under load (an assumption, as none was measured) full bandwidth takes 25 KB
of them on an H100, 19 on an A100, 54 on a B200, what is written included. BEiT-B in bf16, registers
as compiled by Triton 3.7.1:

    forward   one row a warp, 24 elements a thread, 61 registers: 32 warps on a multiprocessor,
              whose x and branch are 96 KB on their way (56 registers and 108 KB on an A100)
    backward  three sums and two vectors beside the row: 235 registers (sm_90), 242 (sm_80), 202
              (sm_100), so 8 warps; while they compute, two further tiles of four tensors come to
              each program by asynchronous copies, 96 KB on their way

BEiT-L is 1024 wide. Forward one row a warp still fits (32 elements, 68 registers, 28 warps, 112 KB
on their way). Backward the sums and vectors alone would be 160 registers, so two warps share a row:
16 elements, 168 registers, 8 warps launched of 12 that fit, 64 KB on their way.

Backward, widths over 6144 take 16 warps, which leaves 128 registers a thread, and a few values go
to the stack (8192: 56 bytes in bf16, 168 in fp32); no ViT is so wide.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._configs import COMPILED

WARP = 32
LOAD_BYTES = 16
MOST_WARPS = 16
KIB = 1024


@dataclass(frozen=True)
class Rows:
    """How rows are given to threads.

    ``elements``: of a row, that a thread holds at most. The fewest warps a row that this allows are
    taken, one if possible, because a row's sums then stay within the warp. ``warps``: of a program,
    unless one row takes more.
    """

    elements: int
    warps: int


@dataclass(frozen=True)
class LayerNormConfig:
    """Choices of the two kernels.

    ``programs``: stretches that the rows are cut into for the backward kernel, at most; so many
    shares of each parameter's gradient are written and summed. ``stages`` and ``prefetch_bytes``:
    tiles of a program that are computed or on their way together, at most, and shared memory for
    those on their way.
    """

    forward: Rows
    backward: Rows
    programs: int
    stages: int
    prefetch_bytes: int
    source: str = COMPILED


@dataclass(frozen=True)
class RowTile:
    """``rows`` rows, each of ``pieces`` pieces of ``columns`` elements, to ``warps`` warps."""

    rows: int
    columns: int
    pieces: int
    warps: int


# 40 elements: 1280 columns by one warp, 74 registers. 24: 72 registers for the sums and 48 for the
# vectors leave no room for more. Programs are two to a multiprocessor (132, 148, 108; 128 of an RTX
# 4090), and what they prefetch is what two of them find there.
FORWARD, BACKWARD = Rows(elements=40, warps=4), Rows(elements=24, warps=4)
HOPPER = LayerNormConfig(FORWARD, BACKWARD, programs=264, stages=3, prefetch_bytes=100 * KIB)
BLACKWELL = LayerNormConfig(FORWARD, BACKWARD, programs=296, stages=3, prefetch_bytes=100 * KIB)
AMPERE = LayerNormConfig(FORWARD, BACKWARD, programs=216, stages=3, prefetch_bytes=72 * KIB)
ADA = LayerNormConfig(FORWARD, BACKWARD, programs=256, stages=3, prefetch_bytes=48 * KIB)

LAYER_NORM: dict[str, LayerNormConfig] = {
    "sm_80": AMPERE,
    "sm_86": ADA,
    "sm_90": HOPPER,
    "sm_100": BLACKWELL,
}


def layer_norm_config(family: str) -> LayerNormConfig:
    return LAYER_NORM[family]


def row_tile(width: int, element_bytes: int, rows: Rows) -> RowTile:
    """Rows of ``width`` elements as pieces of which each thread takes 16 bytes at a time.

    The least padding first (768 is 3 x 256, not 1024), then whatever is nearest to one row a warp.
    """
    vector = LOAD_BYTES // element_bytes
    one_warp = WARP * vector
    best = None
    for exponent in range((one_warp * MOST_WARPS).bit_length()):
        columns = 1 << exponent
        pieces = -(-width // columns)
        if columns < vector or pieces * vector > rows.elements:
            continue
        distance = max(columns, one_warp) // min(columns, one_warp)
        rank = (columns * pieces, distance)
        if best is None or rank < best[0]:
            best = (rank, columns, pieces)
    if best is None:
        raise ValueError(f"rows of {width} elements don't fit the registers")
    _, columns, pieces = best
    warps = max(rows.warps, columns // one_warp)
    return RowTile(warps * one_warp // columns, columns, pieces, warps)


def programs_of(config: LayerNormConfig, total: int, tile: RowTile) -> int:
    """Programs of the backward kernel: a frozen function of shapes and configuration."""
    return min(config.programs, -(-total // tile.rows))


def stages_of(config: LayerNormConfig, tile_bytes: int) -> int:
    """1 (nothing is fetched ahead) or more, by the bytes that the rows of a tile have."""
    return 1 + min(config.stages - 1, config.prefetch_bytes // tile_bytes)
