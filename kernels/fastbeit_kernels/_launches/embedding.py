"""Launches of the patch embedding, forward and backward: 224 pixels, patches of 16, 75 masked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .._embedding import arguments
from .._embedding.geometry import geometry_of, read_shape
from .record import Record, meta, round_up

PATCH, SIDE, SLOTS = 16, 224, 75


@dataclass(frozen=True)
class Shape:
    """One call: B images, D columns; tokens' and images' dtypes are the projection's or fp32."""

    model: str
    batch: int
    width: int
    channels_last: bool = False
    wide_tokens: bool = False
    wide_images: bool = False
    positions: bool = False

    @property
    def words(self) -> str:
        said = {
            "channels-last": self.channels_last,
            "fp32 tokens": self.wide_tokens,
            "fp32 images": self.wide_images,
            "absolute positions": self.positions,
        }
        chosen = (words for words, holds in said.items() if holds)
        return ", ".join([self.model, f"{SLOTS} masked", *chosen])


TRAINING = (Shape("BEiT-B", 128, 768), Shape("BEiT-L", 64, 1024))
# Mixed precision keeps tokens in fp32, and pixels where the augmentation left them.
MIXED = (
    Shape("BEiT-B", 128, 768, wide_tokens=True, wide_images=True),
    Shape(
        "BEiT-B", 128, 768, channels_last=True, wide_tokens=True, wide_images=True, positions=True
    ),
)


def embedding_records(family: str, shape: Shape, dtype: torch.dtype) -> Iterator[Record]:
    """The list of tokens, the tokens, and every gradient."""
    batch, width = shape.batch, shape.width
    images = meta(batch, 3, SIDE, SIDE, dtype=torch.float32 if shape.wide_images else dtype)
    if shape.channels_last:
        images = images.to(memory_format=torch.channels_last)
    geometry = geometry_of(images, PATCH, PATCH)
    patches, tokens, pixels = geometry.patches, geometry.tokens, geometry.pixels
    token_dtype = torch.float32 if shape.wide_tokens else dtype
    read = meta(*read_shape(width, geometry), dtype=dtype)
    vector = meta(width, dtype=token_dtype)
    pos = meta(tokens, width, dtype=token_dtype) if shape.positions else None
    positions = meta(batch, SLOTS, dtype=torch.int32)
    hidden = meta(batch, patches, dtype=torch.int32)
    count, visible = (meta(n, dtype=torch.int32) for n in (batch, 1))
    listed = meta(batch * tokens, dtype=torch.int32)
    out = meta(batch, tokens, width, dtype=token_dtype)
    config = arguments.config_of(images.device, dtype, family)
    shares = meta(arguments.shares_for(config, width, geometry), width, pixels, dtype=torch.float32)
    dweight = meta(width, 3, PATCH, PATCH, dtype=torch.float32)
    seen, masked = (meta(patches, width, dtype=torch.float32) for _ in range(2))
    sums = meta(width, dtype=torch.float32)
    dpos = meta(tokens, width, dtype=torch.float32) if shape.positions else None

    name, element = shape.words, str(dtype).removeprefix("torch.")
    rows = batch * (patches - SLOTS)
    list_bytes = listed.numel() * 4
    hidden_bytes = hidden.numel() * 4
    out_bytes = out.numel() * out.element_size()
    row_bytes = pixels * images.element_size()
    pos_bytes = 0 if pos is None else pos.numel() * pos.element_size()
    read_bytes = read.numel() * read.element_size()
    moved = batch * SLOTS * 4 + 2 * hidden_bytes
    yield Record(
        f"mark hidden patches: {name}", "float32",
        arguments.mark_launch(positions, hidden, count), 0, 0, moved, moved,
    )  # fmt: skip
    moved = hidden_bytes + list_bytes
    yield Record(
        f"list tokens: {name}", "float32",
        arguments.order_launch(hidden, count, listed, visible), 0, 0, moved,
        moved + batch * batch * 4,
    )  # fmt: skip

    tile = config.forward_tile(wide_images=shape.wide_images, positions=shape.positions)
    row_tiles, column_tiles = -(-rows // tile.rows), -(-width // tile.columns)
    padded = row_tiles * tile.rows
    yield Record(
        f"embed tokens: {name}",
        element,
        arguments.forward_launch(
            images, read, vector, vector, vector, pos, listed, visible, out, geometry, config
        ),
        2 * rows * width * pixels,
        2 * padded * column_tiles * tile.columns * round_up(pixels, tile.depth),
        rows * row_bytes + read_bytes + out_bytes + pos_bytes + list_bytes,
        padded * column_tiles * row_bytes
        + row_tiles * read_bytes
        + out_bytes
        + (batch * pos_bytes)
        + column_tiles * list_bytes,
    )

    tile = config.weight
    row_tiles, column_tiles = -(-width // tile.rows), -(-pixels // tile.columns)
    padded = round_up(rows, tile.depth)
    share_bytes = shares.numel() * 4
    dout_bytes = rows * width * out.element_size()
    yield Record(
        f"embedding's dW: {name}",
        element,
        arguments.weight_launch(out, images, listed, visible, shares, dtype, geometry, config),
        2 * rows * width * pixels,
        2 * padded * row_tiles * tile.rows * column_tiles * tile.columns,
        rows * row_bytes + dout_bytes + share_bytes + list_bytes,
        row_tiles * rows * row_bytes + column_tiles * dout_bytes + share_bytes,
    )
    moved = share_bytes + dweight.numel() * 4
    yield Record(
        f"sum of the embedding's dW: {name}", "float32",
        arguments.weight_sum_launch(shares, dweight, geometry), shares.numel(), 0, moved, moved,
    )  # fmt: skip
    parts = 2 * seen.numel() * 4 + (0 if dpos is None else dpos.numel() * 4)
    moved = out_bytes + hidden_bytes + parts
    yield Record(
        f"embedding's sums over images: {name}", element,
        arguments.token_sums_launch(out, hidden, dpos, sums, seen, masked),
        out.numel(), 0, moved, moved,
    )  # fmt: skip
    moved = seen.numel() * 4
    yield Record(
        f"embedding's sum over tokens: {name}", "float32",
        arguments.sum_over_tokens_launch(seen, sums), seen.numel(), 0, moved, moved,
    )  # fmt: skip


def records(family: str) -> Iterator[Record]:
    """Every launch of the embedding on a GPU of a family."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in TRAINING:
            yield from embedding_records(family, shape, dtype)
    for shape in MIXED:
        yield from embedding_records(family, shape, torch.bfloat16)
