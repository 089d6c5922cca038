"""Launch choices as frozen data, one entry a GPU family, element size and head width.

``source`` says where an entry comes from. "compiled": registers, spills and shared memory were read
from compiled code and the shape with the least traffic that fits was taken; nothing was timed yet.
A GPU without an entry of its own gets that of the family nearest in shared memory and instructions
(``family_of``). Results may differ in their last bits from family to family, never from run to run:
nothing here is read from the device but its compute capability.
"""

from __future__ import annotations

from dataclasses import dataclass

COMPILED = "compiled, not measured yet"


@dataclass(frozen=True)
class Tile:
    """A block of query ``rows`` by a block of key ``columns``, computed by ``warps`` warps.

    Chained products lay all warps along the rows of the result (queries in the forward and dQ
    kernels, keys in the dK/dV kernel), 16 rows a warp, so 64 rows take 4 warps and 128 rows 8;
    with more warps than that, the same tile would be computed twice.

    ``maxnreg``: the most registers a thread may have; None leaves it to the compiler.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of the three kernels.

    ``key_programs``: programs that the dK/dV kernel is cut into, at most. More fill the GPU better;
    fewer mean fewer slices of dBias to write and to sum. ``whole_row``: for few enough keys
    (``whole_row_tile``) the forward holds whole rows of scores under this tile; None: it goes
    through the keys block by block at every length, under ``forward``.
    """

    forward: Tile
    queries: Tile
    keys: Tile
    key_programs: int
    source: str = COMPILED
    whole_row: Tile | None = None


# Registers and spills, BEiT-B's heads with bias, bf16, Triton 3.7.1.
#   sm_90: forward 117, dQ 189, dK/dV 231, no spills. 128 rows read keys and values half as often as
#   64 do, and L2 is what binds. Left alone, the forward takes 132 registers, 144 for a subset of
#   queries, and a multiprocessor holds one block; under 128 it holds two, and the loop is the same
#   409 instructions. dQ would spill 24 bytes. 264 programs are two rounds of the H100's 132
#   multiprocessors.
HOPPER = AttentionConfig(Tile(128, 64, 8, 2, 128), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), 264)
HOPPER_WIDE = AttentionConfig(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 128, 8, 2), 264)
#   Whole rows of scores take 1,800 instructions a warp instead of 2,234, and 196 registers: eight
#   warps a multiprocessor instead of sixteen. Which weighs more is for the tuning command to say.
WHOLE_ROW = {("sm_90", 16): Tile(128, 64, 8, 1)}
#   sm_100: forward 122, dQ 119, dK/dV 254. By blocks of 64 keys the forward needs 8 to 16 bytes of
#   stack in one call or another, with two stages or three, with Triton 3.6.0, 3.7.1 and 3.9.0; by
#   32 it needs none. 296 programs are two rounds of the B200's 148 multiprocessors.
BLACKWELL = AttentionConfig(Tile(128, 32, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), 296)
BLACKWELL_WIDE = AttentionConfig(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 128, 8, 2), 296)
#   sm_80: forward 160, dQ 168, dK/dV 247, no spills; 64 keys by 32 queries would spill. 216
#   programs are what the A100's 108 multiprocessors hold at once.
AMPERE = AttentionConfig(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(16, 64, 4, 2), 216)
AMPERE_WIDE = AttentionConfig(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(16, 64, 4, 2), 216)
#   fp32 multiplies on the ordinary units (ieee, never tf32), for checks more than for training.
FP32 = AttentionConfig(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 8, 1), 512)
FP32_WIDE = AttentionConfig(Tile(16, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), 512)

ATTENTION: dict[tuple[str, int, int], AttentionConfig] = {
    (family, bits, width): config
    for family, half, half_wide in (
        ("sm_80", AMPERE, AMPERE_WIDE),
        ("sm_86", AMPERE, AMPERE_WIDE),
        ("sm_90", HOPPER, HOPPER_WIDE),
        ("sm_100", BLACKWELL, BLACKWELL_WIDE),
    )
    for bits, narrow, wide in ((16, half, half_wide), (32, FP32, FP32_WIDE))
    for width, config in ((64, narrow), (128, wide))
}


def family_of(capability: tuple[int, int]) -> str:
    """``sm_80``, ``sm_86`` (and all with 100 KB of shared memory), ``sm_90`` or ``sm_100``."""
    match capability:
        case (8, 0):
            return "sm_80"
        case (9, _):
            return "sm_90"
        case (10, _):
            return "sm_100"
        case _:
            return "sm_86"


def attention_config(family: str, bits: int, padded_width: int) -> AttentionConfig:
    """The entry for elements of ``bits`` and heads ``padded_width`` wide (a power of two)."""
    return ATTENTION[family, bits, max(64, padded_width)]


def whole_row_tile(config: AttentionConfig, keys: int) -> Tile | None:
    """The tile of the whole-row forward if it is chosen and serves ``keys``; else None.

    Up to three blocks and a half: four blocks of 64 keys spill (255 registers, 24 bytes of stack
    on sm_90). Below one block, rows are whole in the other kernel too.
    """
    tile = config.whole_row
    if tile is None or not tile.columns <= keys <= tile.columns * 7 // 2:
        return None
    return tile


def bias_slices(config: AttentionConfig, batch: int, heads: int, keys: int) -> int:
    """Slices that dBias is summed in: a frozen function of shapes and configuration."""
    blocks = -(-keys // config.keys.columns)
    return max(1, min(batch, config.key_programs // (heads * blocks)))
