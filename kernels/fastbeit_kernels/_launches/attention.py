"""Launches of attention, forward and backward, in training's shapes and in longer ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .._attention import arguments as attention
from .._configs import WHOLE_ROW, AttentionConfig, Tile, whole_row_tile
from .._launch import Launch
from .record import Record, meta, round_up


@dataclass(frozen=True)
class Shape:
    """One attention call: B images, H heads, Tq queries, Tk keys."""

    model: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int = 64

    @property
    def positions(self) -> bool:
        return self.queries != self.keys


# The last block asks for the 75 masked tokens only. 577 and 1,601 tokens are images of 384 and 640
# pixels, as in fine-tuning and evaluation.
TRAINING = (
    Shape("BEiT-B", 128, 12, 197, 197),
    Shape("BEiT-B, last block", 128, 12, 75, 197),
    Shape("BEiT-L", 64, 16, 197, 197),
    Shape("BEiT-L, last block", 64, 16, 75, 197),
)
LONG = (Shape("BEiT-B, 384 px", 32, 12, 577, 577), Shape("BEiT-B, 640 px", 8, 12, 1601, 1601))


def _padded_keys(keys: int, tile: Tile) -> int:
    return keys // tile.columns * tile.columns + attention.tail_of(keys, tile.columns)


def attention_records(
    family: str, shape: Shape, dtype: torch.dtype, *, bias: bool = True
) -> Iterator[Record]:
    """Forward, dQ, dK/dV/dBias and the sum over slices of one call; packed unless a subset."""
    batch, heads, queries, keys = shape.batch, shape.heads, shape.queries, shape.keys
    width, size = shape.width, dtype.itemsize
    if shape.positions:
        q = meta(batch, queries, heads, width, dtype=dtype)
        k, v = meta(batch, keys, 2, heads, width, dtype=dtype).unbind(2)
        dq = torch.empty_like(q)
        dk, dv = (meta(batch, keys, heads, width, dtype=dtype) for _ in range(2))
        positions = meta(batch, queries, dtype=torch.int32)
    else:
        q, k, v = meta(batch, keys, 3, heads, width, dtype=dtype).unbind(2)
        dq, dk, dv = meta(batch, keys, 3, heads, width, dtype=dtype).unbind(2)
        positions = None
    out = meta(batch, queries, heads, width, dtype=dtype)
    dout = torch.empty_like(out)
    lse, delta = (meta(batch, heads, queries, dtype=torch.float32) for _ in range(2))
    config = attention.config_of(q, family)
    scale = width**-0.5
    read = slices = None
    if bias:
        read = meta(1, heads, keys, round_up(keys, 8), dtype=dtype)
        count = attention.slices_for(read, k, config)
        slices = meta(count, heads, keys, round_up(keys, 8), dtype=torch.float32)

    name = f"{shape.model}, {queries}x{keys}" + ("" if bias else ", no bias")
    element = str(dtype).removeprefix("torch.")
    pairs = batch * heads * queries * keys
    image_heads = batch * heads
    tensor_q, tensor_k = image_heads * queries * width * size, image_heads * keys * width * size
    row_floats = image_heads * queries * 4
    bias_hbm = heads * keys * keys * size if bias else 0
    bias_l2 = pairs * size if bias else 0

    def record(
        kernel: str, launch: Launch, products: int, tile: tuple[int, int], hbm: int, l2: int
    ) -> Record:
        product = 2 * width * products
        padded = image_heads * tile[0] * tile[1] * product
        return Record(f"{kernel}: {name}", element, launch, pairs * product, padded, hbm, l2)

    def forward_record(kernel: str, config: AttentionConfig) -> Record:
        tile = whole_row_tile(config, keys) or config.forward
        blocks = -(-queries // tile.rows)
        return record(
            kernel,
            attention.forward_launch(q, k, v, read, positions, out, lse, scale, config),
            2,
            (blocks * tile.rows, _padded_keys(keys, tile)),
            2 * tensor_q + 2 * tensor_k + row_floats + bias_hbm,
            2 * tensor_q + 2 * tensor_k * blocks + row_floats + bias_l2,
        )

    yield forward_record("attention forward", config)
    by_rows = dataclasses.replace(config, whole_row=WHOLE_ROW.get((family, size * 8)))
    if whole_row_tile(by_rows, keys) and not whole_row_tile(config, keys):
        # Not chosen yet, but there for the tuning command to choose.
        yield forward_record("attention forward by whole rows", by_rows)
    tile = config.queries
    blocks = -(-queries // tile.rows)
    yield record(
        "attention dQ",
        attention.query_gradient_launch(
            q, k, v, read, positions, out, lse, dout, dq, delta, scale, config
        ),
        3,
        (blocks * tile.rows, _padded_keys(keys, tile)),
        4 * tensor_q + 2 * tensor_k + 2 * row_floats + bias_hbm,
        4 * tensor_q + 2 * tensor_k * blocks + 2 * row_floats + bias_l2,
    )
    tile = config.keys
    blocks = -(-keys // tile.columns)
    slice_bytes = 0 if slices is None else slices.numel() * 4
    # A pair's place in the slice is read and written in fp32 for every image.
    slice_l2 = 0 if slices is None else 2 * pairs * 4
    yield record(
        "attention dK, dV" + (", dBias" if bias else ""),
        attention.key_gradient_launch(
            q, k, v, read, positions, lse, delta, dout, dk, dv, slices, scale, config
        ),
        4,
        (round_up(queries, tile.rows), blocks * tile.columns),
        2 * tensor_q + 4 * tensor_k + 2 * row_floats + bias_hbm + slice_bytes,
        2 * tensor_q * blocks + 4 * tensor_k + 2 * row_floats * blocks + bias_l2 + slice_l2,
    )
    if slices is not None and slices.shape[0] > 1:
        moved = slice_bytes + slices[:1].numel() * 4
        launch = attention.bias_sum_launch(slices, torch.empty_like(slices[:1]))
        yield Record(f"sum of dBias: {name}", "float32", launch, slices.numel(), 0, moved, moved)


def records(family: str) -> Iterator[Record]:
    """Every attention launch on a GPU of a family."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in TRAINING:
            yield from attention_records(family, shape, dtype)
    for shape in LONG:
        yield from attention_records(family, shape, torch.bfloat16)
    yield from attention_records(family, TRAINING[0], torch.bfloat16, bias=False)
