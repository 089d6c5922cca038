"""What a BEiT is: sizes, position scheme, LayerScale (arXiv 2106.08254, tables 1 and 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Position = Literal["relative", "relative_per_block", "absolute", "none"]


@dataclass(frozen=True)
class BeitConfig:
    """Architecture of a BEiT encoder with its heads; the defaults are the released code's base.

    The paper's own base model is ``BeitConfig(position="absolute", layer_scale=None)``.

    Attributes:
        image_size: pixels, one side or (height, width); a multiple of patch_size.
        patch_size: pixels a side.
        in_channels: image channels.
        width: features a token.
        depth: transformer blocks.
        heads: attention heads; they divide the width.
        mlp_ratio: hidden width of the MLP over width.
        position: ``relative``: one relative table shared by all blocks; ``relative_per_block``: one
            in each; ``absolute``: a learned embedding of each place; ``none``.
        layer_scale: start value of LayerScale on both branches, or None for no LayerScale.
        drop_path: largest DropPath rate, reached in the last block, rising linearly from 0. The
            model draws nothing: factors come in as ``drop_scale``.
        vocab_size: visual tokens that the masked-image head tells apart.
        num_classes: classes that the classifier's head tells apart.
        norm_eps: epsilon of every LayerNorm.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4
    position: Position = "relative"
    layer_scale: float | None = 0.1
    drop_path: float = 0.1
    vocab_size: int = 8192
    num_classes: int = 1000
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("patch_size", "in_channels", "width", "depth", "heads", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any(side < 1 or side % self.patch_size for side in self.image_hw):
            raise ValueError(
                f"image_size must be a multiple of patch_size {self.patch_size}, "
                f"got {self.image_hw[0]}x{self.image_hw[1]}"
            )
        if self.width % self.heads:
            raise ValueError(f"heads must divide width {self.width}, got {self.heads} heads")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {self.num_classes}")
        if self.position not in ("relative", "relative_per_block", "absolute", "none"):
            raise ValueError(
                "position must be relative, relative_per_block, absolute or none, "
                f"got {self.position!r}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {self.drop_path}")
        if self.mlp_width < 1:
            raise ValueError(f"mlp_ratio must leave a hidden feature, got {self.mlp_ratio}")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        """N, patches an image."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """T, patches and CLS."""
        return self.patches + 1

    @property
    def head_width(self) -> int:
        """d, features a head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """Hidden features of the MLP."""
        return int(self.width * self.mlp_ratio)
