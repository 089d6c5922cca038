"""Launch choices of the row kernels as frozen data, one entry a GPU family and element size.

Both kernels are bound by memory, so what counts is how many bytes are on their way at any time. An
H100 has 3.35 TB/s of sheet bandwidth and about 1 us from request to use under load: 25 KB a
multiprocessor, read and written together.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._configs import COMPILED

WARP = 32
LOAD_BYTES = 16
MOST_WARPS = 32


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


KIB = 1024
# Registers and blocks a multiprocessor, BEiT-B, bf16 with fp32 parameters, Triton 3.7.1.
FORWARD = Rows(elements=40, warps=4)
HOPPER = LayerNormConfig(FORWARD, Rows(elements=24, warps=4), 264, 3, 100 * KIB)
BLACKWELL = LayerNormConfig(FORWARD, Rows(elements=24, warps=4), 296, 3, 100 * KIB)
AMPERE = LayerNormConfig(FORWARD, Rows(elements=24, warps=4), 216, 3, 72 * KIB)
ADA = LayerNormConfig(FORWARD, Rows(elements=24, warps=4), 256, 3, 48 * KIB)

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
