"""Launch choices of the patch embedding as frozen data, one entry a GPU family and element size."""

from __future__ import annotations

from dataclasses import dataclass

from .._configs import COMPILED


@dataclass(frozen=True)
class ProductTile:
    """``rows`` by ``columns`` of a product's result, ``depth`` of its sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class EmbeddingConfig:
    """Tiles of the projection (tokens by width) and of the weight's gradient (width by pixels).

    ``weight_programs``: programs that the gradient is cut into, at most; more shares of the tokens
    fill the GPU better and cost more fp32 to write and to sum.
    """

    forward: ProductTile
    weight: ProductTile
    weight_programs: int
    source: str = COMPILED


HOPPER = EmbeddingConfig(
    ProductTile(128, 128, 64, 8, 3), ProductTile(128, 128, 64, 8, 3), weight_programs=264
)
BLACKWELL = EmbeddingConfig(
    ProductTile(128, 128, 64, 8, 3), ProductTile(128, 128, 64, 8, 3), weight_programs=296
)
AMPERE = EmbeddingConfig(
    ProductTile(128, 128, 32, 8, 3), ProductTile(128, 128, 32, 8, 3), weight_programs=216
)
AMPERE_SMALL = EmbeddingConfig(
    ProductTile(128, 128, 32, 8, 3), ProductTile(128, 128, 32, 8, 3), weight_programs=168
)
FP32 = EmbeddingConfig(
    ProductTile(64, 64, 16, 4, 3), ProductTile(64, 64, 16, 4, 3), weight_programs=512
)

CONFIGS: dict[tuple[str, int], EmbeddingConfig] = {
    (family, bits): config
    for family, half in (
        ("sm_80", AMPERE),
        ("sm_86", AMPERE_SMALL),
        ("sm_90", HOPPER),
        ("sm_100", BLACKWELL),
    )
    for bits, config in ((16, half), (32, FP32))
}

# Lists of tokens: lanes of the one program an image has.
ORDER_BLOCK = 256
# Sums over images, a tile of images by columns; sums over tokens, of tokens by columns.
IMAGES, IMAGE_COLUMNS = 16, 256
TOKENS, TOKEN_COLUMNS = 32, 32
SUM_BLOCK = 1024
WARPS = 4
