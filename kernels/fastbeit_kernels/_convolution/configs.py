"""Launch choices of the convolutions as frozen data, one entry a GPU family and element size."""

from __future__ import annotations

from dataclasses import dataclass

from .._configs import COMPILED


@dataclass(frozen=True)
class ConvTile:
    """``pixels`` x ``rows`` by ``outputs`` of the result, ``depth`` input channels at a time.

    ``rows`` image rows are computed together (``tiles``) by 3 x 3 convolutions; others take one.
    ``maxnreg`` caps registers: with 256 threads of 128 a multiprocessor holds two blocks.
    """

    pixels: int
    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class ConvConfig:
    """Tiles of the two kernels.

    ``narrow``: of a convolution to 64 channels or fewer; ``wide``: to more; ``pointwise``: of a
    1 x 1 convolution; ``fused``: of a 3 x 3 with a 1 x 1 behind it, ``outputs`` of which are
    computed at a time, up to 64 hidden channels; ``fused_wide``: up to 128.
    """

    narrow: ConvTile
    wide: ConvTile
    pointwise: ConvTile
    fused: ConvTile
    fused_wide: ConvTile
    source: str = COMPILED


# Registers of the published dVAE's convolutions in bf16, Triton 3.7.1; no spills anywhere.
#   sm_90: narrow 190 to 255, wide 200 to 252, pointwise 128 to 162, fused 234, fused_wide 218. Read
#   nine times, the input of a 3 x 3 convolution would take L2 2.1 to 3.7 times as long as the
#   arithmetic or memory takes (256 to 64 channels at 112 x 112: 2,056 µs of L2 for 593); by these
#   rows 1.0 to 1.7 times (878 µs).
HOPPER = ConvConfig(
    narrow=ConvTile(128, 4, 64, 32, 8, 3),
    wide=ConvTile(128, 2, 128, 32, 8, 3),
    pointwise=ConvTile(128, 1, 128, 64, 8, 3),
    fused=ConvTile(64, 4, 64, 32, 4, 3),
    fused_wide=ConvTile(128, 2, 64, 32, 8, 3),
)
#   sm_100: narrow 78 to 86, wide 114 to 122, pointwise 127 to 156, fused 128, fused_wide 123. Twice
#   the accumulators of these don't fit in tensor memory. By 64 channels fused_wide takes 128, and
#   with Triton 3.9.0 8 bytes of stack.
BLACKWELL = ConvConfig(
    narrow=ConvTile(128, 2, 64, 32, 8, 3),
    wide=ConvTile(128, 1, 128, 64, 8, 3),
    pointwise=ConvTile(128, 1, 128, 64, 8, 3),
    fused=ConvTile(128, 2, 64, 32, 8, 3),
    fused_wide=ConvTile(128, 1, 64, 32, 8, 4),
)
#   sm_80, sm_86: by L2's rate one row is no slower than the arithmetic is, within 9 %. narrow 98,
#   fused 128; uncapped the others are up to 158, and a multiprocessor would hold them once. With
#   three stages fused_wide has 8 bytes of stack with Triton 3.9.0; with two, both blocks of a
#   multiprocessor have 32 KB on their way.
AMPERE = ConvConfig(
    narrow=ConvTile(128, 1, 64, 32, 8, 4),
    wide=ConvTile(128, 1, 128, 32, 8, 3, 128),
    pointwise=ConvTile(128, 1, 128, 32, 8, 3, 128),
    fused=ConvTile(128, 1, 64, 32, 8, 3),
    fused_wide=ConvTile(128, 1, 64, 32, 8, 2, 128),
)
#   fp32 multiplies on the ordinary units (ieee, never tf32): 72 to 96 registers on sm_90.
FP32 = ConvConfig(
    narrow=ConvTile(64, 1, 32, 16, 4, 2),
    wide=ConvTile(64, 1, 32, 16, 4, 2),
    pointwise=ConvTile(64, 1, 32, 16, 4, 2),
    fused=ConvTile(32, 1, 32, 16, 4, 2),
    fused_wide=ConvTile(32, 1, 32, 16, 8, 2),
)

CONVOLUTION: dict[tuple[str, int], ConvConfig] = {
    (family, bits): config
    for family, half in (
        ("sm_80", AMPERE),
        ("sm_86", AMPERE),
        ("sm_90", HOPPER),
        ("sm_100", BLACKWELL),
    )
    for bits, config in ((16, half), (32, FP32))
}
