"""Launch choices of the argmax head as frozen data, one entry a GPU family and element size.

The product's tile decides: it reads (rows + columns) * depth elements for rows * columns * depth
products, so 128 x 256 halves what 64 x 128 takes from L2, and its 128 fp32 sums a thread of 8 warps
are what the register file carries beside the addresses of the loads.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._configs import COMPILED


@dataclass(frozen=True)
class ProductTile:
    """``rows`` of x by ``columns`` classes, ``depth`` of D at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    source: str = COMPILED


# Registers, 2048 deep, 8192 classes, bf16 with bias, Triton 3.7.1; no spills:
#   sm_90: 198, and 196,608 bytes of shared memory. A step is 1,024 clocks of products, and four
#   stages keep three of them between a load and its use.
HOPPER = ProductTile(128, 256, 64, 8, 4)
#   sm_100: 206. 128 rows by 256 columns would need 24 bytes of stack.
BLACKWELL = ProductTile(256, 128, 64, 8, 4)
#   sm_80: 215 (with a depth of 64: 252).
AMPERE = ProductTile(128, 256, 32, 8, 4)
#   sm_86: 219, and 49,152 bytes, so that two blocks share the 100 KB of a multiprocessor.
AMPERE_SMALL = ProductTile(128, 128, 32, 4, 4)
#   fp32 on the ordinary units: 128. 128 x 128 would take 254.
FP32 = ProductTile(128, 64, 16, 8, 3)

TILES: dict[tuple[str, int], ProductTile] = {
    (family, bits): tile
    for family, half in (
        ("sm_80", AMPERE),
        ("sm_86", AMPERE_SMALL),
        ("sm_90", HOPPER),
        ("sm_100", BLACKWELL),
    )
    for bits, tile in ((16, half), (32, FP32))
}

# Rows whose programs go through all columns before the next ones. A round of the H100's 132
# programs then reads 16 tiles of 128 rows and 8 of 256 columns, 4,096 rows of D together: the
# fewest.
GROUP_ROWS = 2048

# The reduction: tiles taken at once, rows of a program.
REDUCED_TILES = 32
REDUCED_ROWS = 64
REDUCED_WARPS = 4
