"""Launches of the tokenizer's head: an argmax over 8192 codes at BEiT's masked positions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._linear_argmax import ops
from .record import Record, meta, round_up

WIDTH = 2048
CLASSES = 8192
# B * 75 masked positions of BEiT-B's and BEiT-L's batches.
ROWS = (("BEiT-B", 128 * 75), ("BEiT-L", 64 * 75))


def argmax_records(
    family: str, model: str, rows: int, dtype: torch.dtype, *, classes: int = CLASSES
) -> Iterator[Record]:
    """The product and the reduction over its tiles."""
    size = dtype.itemsize
    x = meta(rows, WIDTH, dtype=dtype)
    weight = meta(classes, WIDTH, dtype=dtype)
    bias = meta(classes, dtype=dtype)
    tile = ops.tile_for(x, family)
    tiles = -(-classes // tile.columns)
    best, column = (meta(tiles, rows, dtype=t) for t in (torch.float32, torch.int32))
    codes = meta(rows, dtype=torch.int64)
    name = f"{model}, {rows} rows of {WIDTH}, {classes} codes"
    padded_rows, padded_classes = round_up(rows, tile.rows), round_up(classes, tile.columns)
    row_tiles = padded_rows // tile.rows
    partials = tiles * rows * 8
    inputs = (rows + classes) * WIDTH * size + classes * size
    yield Record(
        f"argmax product: {name}",
        str(dtype).removeprefix("torch."),
        ops.product_launch(x, weight, bias, best, column, tile),
        2 * rows * classes * WIDTH,
        2 * padded_rows * padded_classes * round_up(WIDTH, tile.depth),
        inputs + partials,
        (tiles * padded_rows + row_tiles * padded_classes) * WIDTH * size + partials,
    )
    moved = partials + rows * 8
    launch = ops.reduction_launch(best, column, codes)
    yield Record(f"argmax of tiles: {name}", "float32", launch, tiles * rows, 0, moved, moved)


def records(family: str) -> Iterator[Record]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for model, rows in ROWS:
            yield from argmax_records(family, model, rows, dtype)
