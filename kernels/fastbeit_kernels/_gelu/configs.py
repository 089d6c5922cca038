"""Launch choices of the GELU kernels as frozen data, one entry a GPU family.

Both are bound by memory as long as their instructions stay below it. BEiT-B in bf16 on an H100
(Triton 3.7.1; SASS counted with the loop's turns, four instructions a clock and multiprocessor at
1.755 GHz; decision 0007):

    forward    18 instructions an element, 47 us, of 103 us for its bytes;  40 registers, 12 blocks
    backward   25, with dbias, 66 us, of 156 us;  56 registers, 9 blocks (sm_80: 48 and 10)
"""

from __future__ import annotations

from dataclasses import dataclass

from .._configs import COMPILED

WARP = 32
LOAD_BYTES = 16


@dataclass(frozen=True)
class GeluConfig:
    """``warps`` a program, in both kernels; each thread takes 16 bytes of each row of a tile.

    ``forward_rows``: rows of a program; the bias is loaded beside each, and under few rows it is
    much of all that is loaded, while many leave a multiprocessor few blocks. ``backward_rows``: of
    a turn. ``programs``: of the backward kernel, at most. Each owns some columns of a stretch of
    rows and writes one share of dbias, so more of them fill the GPU better and leave more to sum.
    ``stages``: tiles of the backward kernel that are computed or on their way, together.
    """

    warps: int
    forward_rows: int
    backward_rows: int
    programs: int
    stages: int
    source: str = COMPILED


# Eight programs a multiprocessor (132, 148, 108; 128 of an RTX 4090), which holds them together.
HOPPER = GeluConfig(4, 4, 1, 1056, 2)
BLACKWELL = GeluConfig(4, 4, 1, 1184, 2)
AMPERE = GeluConfig(4, 4, 1, 864, 2)
ADA = GeluConfig(4, 4, 1, 1024, 2)

GELU: dict[str, GeluConfig] = {
    "sm_80": AMPERE,
    "sm_86": ADA,
    "sm_90": HOPPER,
    "sm_100": BLACKWELL,
}


def columns_of(config: GeluConfig, width: int, element_bytes: int) -> int:
    """Columns of a tile: those that all threads of a program load at once, or the width's."""
    most = config.warps * WARP * LOAD_BYTES // element_bytes
    return min(most, max(WARP, 1 << (width - 1).bit_length()))


def stretches_of(config: GeluConfig, rows: int, width: int, columns: int) -> int:
    """Stretches that the rows are cut into: a frozen function of shapes and configuration."""
    blocks = -(-width // columns)
    return max(1, min(config.programs // blocks, -(-rows // config.backward_rows)))
