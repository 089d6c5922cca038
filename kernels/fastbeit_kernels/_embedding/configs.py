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

    ``wide_images`` is for images of more bytes than the projection's dtype, which go through
    registers on their way; ``positions`` for absolute positions, whose tile joins that of the sums.

    ``weight_programs``: programs that the gradient is cut into, at most; more shares of the tokens
    fill the GPU better and cost more fp32 to write and to sum.
    """

    forward: ProductTile
    wide_images: ProductTile
    positions: ProductTile
    weight: ProductTile
    weight_programs: int
    source: str = COMPILED

    def forward_tile(self, *, wide_images: bool, positions: bool) -> ProductTile:
        if positions:
            return self.positions
        return self.wide_images if wide_images else self.forward


# Registers, BEiT-B with 75 masked, Triton 3.7.1; no spills. "wide" is bf16 with fp32 images and
# tokens, then with absolute positions too.
#   sm_90: tokens 226 (wide: 242, 224), gradient 196 (210, 218). With positions, 128 by 256 would
#   need 552 bytes of stack. 126 programs of the gradient are one round of 132 multiprocessors.
#   sm_100: tokens 198 (250, 252), gradient 226 (230, 230).
#   sm_80: tokens 166 (167, 209), gradient 127 (128, 128); two blocks of it a multiprocessor.
# The gradient's loads wait for the list of tokens: with five stages the list is read two steps
# before the pixels, and the pixels two before their product.
HOPPER = EmbeddingConfig(
    forward=ProductTile(128, 256, 64, 8, 3),
    wide_images=ProductTile(128, 256, 32, 8, 4),
    positions=ProductTile(128, 128, 64, 8, 3),
    weight=ProductTile(128, 256, 32, 8, 5),
    weight_programs=132,
)
BLACKWELL = EmbeddingConfig(
    forward=ProductTile(128, 256, 64, 8, 3),
    wide_images=ProductTile(128, 256, 32, 8, 4),
    positions=ProductTile(128, 128, 32, 8, 4),
    weight=ProductTile(128, 256, 32, 8, 5),
    weight_programs=148,
)
AMPERE = EmbeddingConfig(
    forward=ProductTile(128, 128, 32, 8, 4),
    wide_images=ProductTile(128, 128, 32, 8, 4),
    positions=ProductTile(128, 128, 32, 8, 4),
    weight=ProductTile(128, 128, 32, 8, 5),
    weight_programs=216,
)
AMPERE_SMALL = EmbeddingConfig(
    forward=ProductTile(128, 128, 32, 8, 3),
    wide_images=ProductTile(128, 128, 32, 8, 3),
    positions=ProductTile(128, 128, 32, 8, 3),
    weight=ProductTile(128, 128, 32, 8, 5),
    weight_programs=164,
)
#   fp32: the gradient by 8 warps takes 62 to 64. By 4, on sm_80, Triton 3.6.0 takes 72 and 16 bytes
#   of stack, and 3.7.1 takes 80, so that a multiprocessor holds 24 warps instead of 32.
FP32 = EmbeddingConfig(
    forward=ProductTile(64, 64, 16, 4, 3),
    wide_images=ProductTile(64, 64, 16, 4, 3),
    positions=ProductTile(64, 64, 16, 4, 3),
    weight=ProductTile(64, 64, 16, 8, 5),
    weight_programs=528,
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

# Lists of tokens: lanes of the one program an image has, one a thread: 32 registers on sm_90 and 15
# barriers in the code. By half the threads it takes 40 and 23, and Triton 3.6.0 spills 8 bytes.
ORDER_BLOCK, ORDER_WARPS = 256, 8
# Sums over images, a tile of images by columns; sums over tokens, of tokens by columns.
IMAGES, IMAGE_COLUMNS = 16, 256
TOKENS, TOKEN_COLUMNS = 32, 32
SUM_BLOCK = 1024
WARPS = 4
