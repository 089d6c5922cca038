"""Launch choices of the convolutions as frozen data, one entry a GPU family and element size."""

from __future__ import annotations

from dataclasses import dataclass

from .._configs import COMPILED


@dataclass(frozen=True)
class ConvTile:
    """``pixels`` by ``outputs`` of the result, ``depth`` input channels at a time."""

    pixels: int
    outputs: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ConvConfig:
    """Tiles of the two kernels.

    ``narrow``: of a convolution to 64 channels or fewer; ``wide``: to more; ``fused``: of the one
    with the 1 x 1 behind it, ``outputs`` of which are computed at a time, up to 64 hidden channels;
    ``fused_wide``: up to 128.
    """

    narrow: ConvTile
    wide: ConvTile
    fused: ConvTile
    fused_wide: ConvTile
    source: str = COMPILED


HOPPER = ConvConfig(
    ConvTile(128, 64, 64, 8, 3),
    ConvTile(128, 128, 64, 8, 3),
    ConvTile(128, 64, 64, 8, 3),
    ConvTile(128, 64, 64, 8, 3),
)
BLACKWELL = HOPPER
AMPERE = ConvConfig(
    ConvTile(128, 64, 64, 8, 3),
    ConvTile(128, 128, 32, 8, 3),
    ConvTile(128, 64, 32, 8, 3),
    ConvTile(64, 32, 32, 4, 3),
)
FP32 = ConvConfig(
    ConvTile(64, 32, 16, 4, 2),
    ConvTile(64, 32, 16, 4, 2),
    ConvTile(32, 32, 16, 4, 2),
    ConvTile(32, 32, 16, 8, 2),
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
