"""Calls of attention and of the table's expansion: sizes, random inputs, least work.

Shapes: B images, Tq queries, Tk keys, T tokens, H heads, d head width, R table rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.call import Call
from benchmarks.operation import Pass
from benchmarks.operations.attention import counts, definition
from benchmarks.roofline import FLOAT_BYTES, INDEX_BYTES, Work

Kind = Literal["attention", "packed", "table", "packed table", "expand"]
Bias = Literal["none", "heads", "images", "all", "keys"]


@dataclass(frozen=True)
class Attention:
    """``packed``: q, k, v are views of one ``[B, T, 3, H, d]`` leaf, as a block's linear layer
    leaves them, and their gradient comes back as one tensor. ``subset``: the queries are named rows
    of the bias, as in the last block, where only masked patches reach the loss; ``empty``: some
    slots name none (-1). ``aligned``: rows of the bias a multiple of 8 elements apart, as the
    expanded table has them."""

    batch: int
    heads: int
    queries: int
    keys: int
    width: int = 64
    bias: Bias = "heads"
    kind: Kind = "attention"
    grid: tuple[int, int] | None = None
    subset: bool = False
    empty: bool = True
    aligned: bool = False

    @property
    def expands(self) -> bool:
        return self.kind == "expand"

    def describe(self) -> str:
        return f"{self.batch}×{self.heads}, {self.queries}×{self.keys}"

    def shrunk(self) -> Attention:
        if self.grid is not None:
            tokens, grid = 7, (2, 3)
            queries = 3 if self.subset else tokens
            small = replace(self, heads=2, queries=queries, keys=tokens, grid=grid, width=16)
            return replace(small, batch=min(self.batch, 2))
        queries, keys = (min(size, 5 + size % 7) for size in (self.queries, self.keys))
        return replace(
            self,
            batch=min(self.batch, 2),
            heads=min(self.heads, 2),
            queries=min(3, queries) if self.subset else queries,
            keys=keys,
            width=min(self.width, 24),
        )

    def work(self, direction: Pass, dtype: torch.dtype) -> Work:
        if direction == "both":
            return self.work("forward", dtype) + self.work("backward", dtype)
        forward = direction != "backward"
        rows = 0 if self.grid is None else definition.table_rows(self.grid)
        if self.expands:
            count = counts.expand_forward if forward else counts.expand_backward
            return count(rows, self.keys, self.heads)
        count = counts.attention_forward if forward else counts.attention_backward
        total = count(
            self.batch,
            self.heads,
            self.queries,
            self.keys,
            self.width,
            element_bytes=dtype.itemsize,
            # From the table, one perfect kernel would keep the expanded bias on the chip.
            bias_elements=0 if "table" in self.kind else self.heads * self.keys**2,
        )
        if "table" in self.kind:
            table = rows * self.heads * FLOAT_BYTES
            index = self.keys**2 * INDEX_BYTES if forward else 0
            total = total + Work(0, table + index)
        return total

    def make(self, dtype: torch.dtype, seed: int, device: torch.device) -> Call:
        """Bias and table are fp32, as training has them."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        batch, heads, queries, keys = self.batch, self.heads, self.queries, self.keys
        leaves: dict[str, Tensor] = {}
        given: dict[str, Tensor] = {}
        if self.kind in ("packed", "packed table"):
            leaves["qkv"] = normal(batch, keys, 3, heads, self.width, dtype=dtype)
        elif not self.expands:
            for name, tokens in (("q", queries), ("k", keys), ("v", keys)):
                leaves[name] = normal(batch, tokens, heads, self.width, dtype=dtype)
        if self.kind in ("table", "packed table", "expand"):
            assert self.grid is not None
            leaves["table"] = normal(definition.table_rows(self.grid), heads)
            given["index"] = definition.relative_index(self.grid, device)
        elif self.bias != "none":
            rows = keys if self.subset else queries
            padded = -(-keys // 8) * 8 if self.aligned else keys
            shape = {
                "heads": (heads, rows, padded),
                "images": (batch, 1, rows, padded),
                "all": (batch, heads, rows, padded),
                "keys": (1, 1, 1, padded),
            }[self.bias]
            leaves["bias"] = normal(*shape)[..., :keys]
        if self.subset:
            given["positions"] = self._positions(generator, device)
        if self.expands:
            dout = normal(heads, keys, keys)
        else:
            dout = normal(batch, queries, heads, self.width, dtype=dtype)
        batched = {"q", "k", "v", "qkv", "positions"}
        batched |= set() if self.expands else {"out"}
        batched |= {"bias"} if self.bias in ("images", "all") else set()
        return Call(self, leaves, given, {"out": dout}, frozenset(batched))

    def _positions(self, generator: torch.Generator, device: torch.device) -> Tensor:
        """Distinct rows in order: of all, some slots empty; or as in training, without CLS."""
        first = 0 if self.empty else 1
        drawn = torch.rand(self.batch, self.keys - first, generator=generator, device=device)
        places = drawn.argsort(1)[:, : self.queries] + first
        positions = places.sort(1).values.to(torch.int32)
        if self.empty:
            positions[0, -1] = positions[-1, : max(1, self.queries // 5)] = -1
        return positions


def qkv(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    if "qkv" in call.leaves:
        q, k, v = call.leaves["qkv"].unbind(2)
        return q, k, v
    return call.leaves["q"], call.leaves["k"], call.leaves["v"]
