"""Every kernel that training and evaluation launch, as data for the compile report.

``launches(family)`` builds the launches of BEiT-B and BEiT-L from meta tensors with the very code
that runs them, so that what is reported is what is run. Each comes with its arithmetic and traffic,
counted from the shapes:

    flops           of the formulas
    padded_flops    of the tiles that are computed, padding included
    hbm_bytes       every tensor once
    l2_bytes        what all programs read and write together

Importing this imports Triton, but needs no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._attention import arguments as attention
from ._configs import Tile
from ._launch import Launch
from ._rel_pos_bias import ops as rel_pos_bias

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


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
GRIDS = {197: (14, 14), 577: (24, 24), 1601: (40, 40)}


@dataclass(frozen=True)
class Record:
    """A launch with what its compilation needs, and what it computes and moves."""

    name: str
    dtype: str
    launch: Launch
    flops: int
    padded_flops: int
    hbm_bytes: int
    l2_bytes: int

    def signature(self) -> dict[str, str]:
        """Type of each argument as ``triton.compiler.ASTSource`` takes it, in their order."""
        return {name: self._type(name) for name in self.launch.kernel.arg_names}

    def constants(self) -> dict[str, Any]:
        """Compile-time values: the kernel's own, and integers of one, which Triton folds in."""
        ones = {name: value for name, value in self.launch.arguments.items() if _is_one(value)}
        return {**self.launch.constants, **ones}

    def divisible_by_16(self) -> list[str]:
        """Arguments known to be multiples of 16 (pointers: bytes), as at a launch."""
        found = []
        for name, value in self.launch.arguments.items():
            whole = isinstance(value, int) and not _is_one(value) and value % 16 == 0
            if isinstance(value, Tensor) or whole:
                found.append(name)
        return found

    def source_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``triton.compiler.ASTSource``."""
        names = list(self.launch.kernel.arg_names)
        return {
            "fn": self.launch.kernel,
            "signature": self.signature(),
            "constexprs": {(names.index(name),): value for name, value in self.constants().items()},
            "attrs": {
                (names.index(name),): [["tt.divisibility", 16]] for name in self.divisible_by_16()
            },
        }

    def _type(self, name: str) -> str:
        if name in self.constants():
            return "constexpr"
        value = self.launch.arguments[name]
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def _ceil(value: int, step: int) -> int:
    return -(-value // step) * step


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _padded_keys(keys: int, tile: Tile) -> int:
    return keys // tile.columns * tile.columns + attention.tail_of(keys, tile.columns)


def attention_records(
    family: str, shape: Shape, dtype: torch.dtype, *, bias: bool = True
) -> Iterator[Record]:
    """Forward, dQ, dK/dV/dBias and the sum over slices of one call; packed unless a subset."""
    batch, heads, queries, keys = shape.batch, shape.heads, shape.queries, shape.keys
    width, size = shape.width, dtype.itemsize
    if shape.positions:
        q = _meta(batch, queries, heads, width, dtype=dtype)
        k, v = _meta(batch, keys, 2, heads, width, dtype=dtype).unbind(2)
        dq = torch.empty_like(q)
        dk, dv = (_meta(batch, keys, heads, width, dtype=dtype) for _ in range(2))
        positions = _meta(batch, queries, dtype=torch.int32)
    else:
        q, k, v = _meta(batch, keys, 3, heads, width, dtype=dtype).unbind(2)
        dq, dk, dv = _meta(batch, keys, 3, heads, width, dtype=dtype).unbind(2)
        positions = None
    out = _meta(batch, queries, heads, width, dtype=dtype)
    dout = torch.empty_like(out)
    lse, delta = (_meta(batch, heads, queries, dtype=torch.float32) for _ in range(2))
    config = attention.config_of(q, family)
    scale = width**-0.5
    read = slices = None
    if bias:
        read = _meta(1, heads, keys, _ceil(keys, 8), dtype=dtype)
        count = attention.slices_for(read, k, config)
        slices = _meta(count, heads, keys, _ceil(keys, 8), dtype=torch.float32)

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

    tile = config.forward
    blocks = -(-queries // tile.rows)
    yield record(
        "attention forward",
        attention.forward_launch(q, k, v, read, positions, out, lse, scale, config),
        2,
        (blocks * tile.rows, _padded_keys(keys, tile)),
        2 * tensor_q + 2 * tensor_k + row_floats + bias_hbm,
        2 * tensor_q + 2 * tensor_k * blocks + row_floats + bias_l2,
    )
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
        (_ceil(queries, tile.rows), blocks * tile.columns),
        2 * tensor_q + 4 * tensor_k + 2 * row_floats + bias_hbm + slice_bytes,
        2 * tensor_q * blocks + 4 * tensor_k + 2 * row_floats * blocks + bias_l2 + slice_l2,
    )
    if slices is not None and slices.shape[0] > 1:
        moved = slice_bytes + slices[:1].numel() * 4
        launch = attention.bias_sum_launch(slices, torch.empty_like(slices[:1]))
        yield Record(f"sum of dBias: {name}", "float32", launch, slices.numel(), 0, moved, moved)


def table_records(tokens: int, heads: int) -> Iterator[Record]:
    """Expansion of a relative table and its gradient, by the grid and by the sorted index."""
    grid = GRIDS[tokens]
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    table = _meta(rows, heads, dtype=torch.float32)
    index = _meta(tokens, tokens, dtype=torch.int64)
    bias = _meta(heads, tokens, _ceil(tokens, 8), dtype=torch.float32)[..., :tokens]
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
    order, starts = _meta(places, dtype=torch.int64), _meta(rows + 1, dtype=torch.int64)
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


def launches(family: str) -> list[Record]:
    """All launches on a GPU of a family (``_configs.family_of``)."""
    records = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in TRAINING:
            records += attention_records(family, shape, dtype)
    for shape in LONG:
        records += attention_records(family, shape, torch.bfloat16)
    records += attention_records(family, TRAINING[0], torch.bfloat16, bias=False)
    for tokens, heads in ((197, 12), (197, 16), (577, 12), (1601, 12)):
        records += table_records(tokens, heads)
    return records
