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
    """

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class AttentionConfig:
    whole_rows: Tile  # columns: the widest key tile
    online: Tile
    queries: Tile  # dQ
    keys: Tile  # dK, dV, dBias
    # Programs that the dK/dV kernel is cut into, at most: more fill the GPU better, fewer make
    # fewer slices of dBias to write and to sum.
    key_programs: int
    source: str = COMPILED


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


HOPPER_64 = AttentionConfig(
    whole_rows=Tile(128, 128, 8, 2),
    online=Tile(128, 64, 8, 2),
    queries=Tile(128, 64, 8, 2),
    keys=Tile(32, 128, 8, 2),
    key_programs=264,
)
FP32 = AttentionConfig(
    whole_rows=Tile(32, 64, 4, 1),
    online=Tile(32, 32, 4, 1),
    queries=Tile(32, 32, 4, 1),
    keys=Tile(16, 32, 4, 1),
    key_programs=512,
)


def attention_config(family: str, bits: int, padded_width: int) -> AttentionConfig:
    return FP32 if bits == 32 else HOPPER_64


def bias_slices(config: AttentionConfig, batch: int, heads: int, keys: int) -> int:
    """Slices that dBias is summed in: a frozen function of shapes and configuration."""
    blocks = -(-keys // config.keys.columns)
    return max(1, min(batch, config.key_programs // (heads * blocks)))
