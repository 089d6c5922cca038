"""Launches of the relative table's expansion and of its gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._rel_pos_bias import ops as rel_pos_bias
from .record import Record, meta, round_up

GRIDS = {197: (14, 14), 577: (24, 24), 1601: (40, 40)}


def table_records(tokens: int, heads: int) -> Iterator[Record]:
    """Expansion of a relative table and its gradient, by the grid and by the sorted index."""
    grid = GRIDS[tokens]
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    table = meta(rows, heads, dtype=torch.float32)
    index = meta(tokens, tokens, dtype=torch.int64)
    bias = meta(heads, tokens, round_up(tokens, 8), dtype=torch.float32)[..., :tokens]
    places, spread = tokens * tokens, heads * tokens * tokens * 4
    name = f"{heads} heads, {tokens} tokens"
    moved = spread + 8 * places
    yield Record(
        f"expand table: {name}",
        "float32",
        rel_pos_bias.expand_launch(table, index, bias),
        0,
        0,
        moved + table.numel() * 4,
        moved + spread,
    )
    order, starts = meta(places, dtype=torch.int64), meta(rows + 1, dtype=torch.int64)
    for way, arguments, extra in (
        ("grid", (None, None, table, grid), 0),
        ("index", (order, starts, table, (0, 0)), 8 * places),
    ):
        launch = rel_pos_bias.reduce_launch(bias, *arguments)
        # A place is 4 bytes of a 32-byte sector that nobody else reads at that moment.
        yield Record(
            f"reduce to table by {way}: {name}",
            "float32",
            launch,
            heads * places,
            0,
            spread + extra,
            8 * spread + extra,
        )


def records(family: str) -> Iterator[Record]:
    """The same launches on every family."""
    for tokens, heads in ((197, 12), (197, 16), (577, 12), (1601, 12)):
        yield from table_records(tokens, heads)
