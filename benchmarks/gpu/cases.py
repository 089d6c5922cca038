"""Calls whose results are checked on the device, and what is ours, plain and true of each.

Shapes: B images, Tq queries, Tk keys, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

import fastbeit_kernels
from benchmarks import definition

Kind = Literal["attention", "packed", "table", "packed table", "expand"]
Bias = Literal["none", "heads", "images", "all", "keys"]


@dataclass(frozen=True)
class Case:
    """``empty``: query positions, some of them -1. ``why``: what the shape is there for."""

    name: str
    why: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int = 64
    bias: Bias = "heads"
    kind: Kind = "attention"
    grid: tuple[int, int] | None = None
    subset: bool = False
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    seeds: int = 3

    def shrunk(self) -> Case:
        """The same kind of call, small enough to interpret."""
        if self.grid is not None:
            tokens, grid = 7, (2, 3)
            queries = 3 if self.subset else tokens
            return replace(
                self,
                batch=min(self.batch, 2),
                heads=2,
                queries=queries,
                keys=tokens,
                grid=grid,
                width=16,
                dtypes=("float32",),
                seeds=1,
            )
        queries, keys = (min(size, 5 + size % 7) for size in (self.queries, self.keys))
        return replace(
            self,
            batch=min(self.batch, 2),
            heads=min(self.heads, 2),
            queries=min(3, queries) if self.subset else queries,
            keys=keys,
            width=min(self.width, 24),
            dtypes=("float32",),
            seeds=1,
        )


@dataclass
class Call:
    """Inputs of one case. ``fixed`` take no gradient."""

    case: Case
    leaves: dict[str, Tensor]
    dout: Tensor
    positions: Tensor | None = None
    index: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Call:
        """The same values in a higher precision."""
        leaves = {name: tensor.to(dtype) for name, tensor in self.leaves.items()}
        return replace(self, leaves=leaves, dout=self.dout.to(dtype))

    def images(self, first: int, last: int) -> Call:
        """Images [first, last) of the batch."""
        cut = {"q", "k", "v", "qkv"} | ({"bias"} if self.case.bias in ("images", "all") else set())
        leaves = {n: x[first:last] if n in cut else x for n, x in self.leaves.items()}
        positions = None if self.positions is None else self.positions[first:last]
        dout = self.dout if self.case.kind == "expand" else self.dout[first:last]
        return replace(self, leaves=leaves, dout=dout, positions=positions)

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        if "qkv" in self.leaves:
            q, k, v = self.leaves["qkv"].unbind(2)
            return q, k, v
        return self.leaves["q"], self.leaves["k"], self.leaves["v"]


Operation = Callable[[Call], Tensor]


def ours(call: Call) -> Tensor:
    """The kernels, by their public names."""
    leaves, kind, grid = call.leaves, call.case.kind, call.case.grid
    if kind == "expand":
        return fastbeit_kernels.expand_rel_pos_bias(
            leaves["table"], _index(call), grid=grid, impl="triton"
        )
    if kind == "packed":
        return fastbeit_kernels.attention_packed(leaves["qkv"], leaves.get("bias"), impl="triton")
    if kind == "packed table":
        return fastbeit_kernels.rel_pos_attention_packed(
            leaves["qkv"], leaves["table"], _index(call), grid=grid, impl="triton"
        )
    q, k, v = call.qkv()
    if kind == "table":
        return fastbeit_kernels.rel_pos_attention(
            q,
            k,
            v,
            leaves["table"],
            _index(call),
            query_positions=call.positions,
            grid=grid,
            impl="triton",
        )
    return fastbeit_kernels.attention(
        q, k, v, leaves.get("bias"), query_positions=call.positions, impl="triton"
    )


def by_definition(call: Call) -> Tensor:
    """The formulas, in the inputs' own precision."""
    bias = call.leaves.get("bias")
    if "table" in call.leaves:
        bias = definition.expand(call.leaves["table"], _index(call))
    if call.case.kind == "expand":
        assert bias is not None
        return bias
    return definition.attention(*call.qkv(), bias, call.positions)


def _index(call: Call) -> Tensor:
    assert call.index is not None
    return call.index


def make_call(case: Case, dtype: str, seed: int, device: torch.device) -> Call:
    """Fresh random inputs. Bias and table are fp32, as training has them."""
    generator = torch.Generator(device).manual_seed(seed)
    precision: torch.dtype = getattr(torch, dtype)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    batch, heads, queries, keys = case.batch, case.heads, case.queries, case.keys
    leaves: dict[str, Tensor] = {}
    if case.kind in ("packed", "packed table"):
        leaves["qkv"] = normal(batch, keys, 3, heads, case.width, dtype=precision)
    elif case.kind != "expand":
        for name, tokens in (("q", queries), ("k", keys), ("v", keys)):
            leaves[name] = normal(batch, tokens, heads, case.width, dtype=precision)
    index = None
    if case.kind in ("table", "packed table", "expand"):
        grid = case.grid
        assert grid is not None
        leaves["table"] = normal(definition.table_rows(grid), heads)
        index = definition.relative_index(grid, device)
    elif case.bias != "none":
        rows = keys if case.subset else queries
        shape = {
            "heads": (heads, rows, keys),
            "images": (batch, 1, rows, keys),
            "all": (batch, heads, rows, keys),
            "keys": (1, 1, 1, keys),
        }[case.bias]
        leaves["bias"] = normal(*shape)
    positions = None
    if case.subset:
        places = torch.rand(batch, keys, generator=generator, device=device).argsort(1)
        positions = places[:, :queries].sort(1).values.to(torch.int32)
        positions[0, -1] = positions[-1, : max(1, queries // 5)] = -1
    if case.kind == "expand":
        dout = normal(heads, keys, keys)
    else:
        dout = normal(batch, queries, heads, case.width, dtype=precision)
    return Call(case, leaves, dout, positions, index)


HALF = ("bfloat16", "float16")
# In order of worth. The full sizes are those that training launches; the rest are the edges.
CASES = (
    Case("BEiT at 224 pixels", "the whole-row path", 3, 3, 197, 197, kind="packed"),
    Case(
        "query subset",
        "75 of 197 rows, empty slots",
        3,
        2,
        75,
        197,
        subset=True,
        grid=(14, 14),
        kind="table",
    ),
    Case(
        "BEiT-B at full size",
        "slices of dBias, grid of a whole GPU",
        128,
        12,
        197,
        197,
        kind="packed",
        dtypes=("bfloat16",),
        seeds=1,
    ),
    Case(
        "BEiT-B last block at full size",
        "the same with positions",
        128,
        12,
        75,
        197,
        subset=True,
        dtypes=("bfloat16",),
        seeds=1,
    ),
    Case(
        "table to output",
        "the table's gradient",
        4,
        3,
        197,
        197,
        grid=(14, 14),
        kind="packed table",
    ),
    Case("5 x 7 grid", "a window that is no square", 3, 3, 36, 36, grid=(5, 7), kind="table"),
    Case(
        "expand 14 x 14",
        "the table alone",
        1,
        12,
        197,
        197,
        grid=(14, 14),
        kind="expand",
        dtypes=("float32",),
    ),
    Case("577 tokens", "384 pixels: the online path", 2, 2, 577, 577),
    Case("1601 tokens", "640 pixels", 1, 2, 1601, 1601, kind="packed"),
    Case("50 tokens", "patches of 32, no bias", 3, 3, 50, 50, bias="none"),
    Case("65 tokens", "a tile and one key, a bias an image", 3, 2, 65, 65, bias="images"),
    Case("one query", "a row alone, heads no power of two", 3, 2, 1, 40, width=48),
    Case("batch 1", "nothing to sum over", 1, 3, 197, 197, bias="all"),
    Case("wide heads", "d = 128, whole tiles of keys", 2, 2, 65, 128, width=128),
    Case("narrow heads", "d = 16, a bias by key", 2, 4, 33, 50, width=16, bias="keys"),
    Case("head width 80", "padded heads", 2, 2, 50, 197, width=80),
    Case(
        "expand 5 x 7",
        "a window that is no square",
        1,
        3,
        36,
        36,
        grid=(5, 7),
        kind="expand",
        dtypes=("float32",),
    ),
    Case(
        "BEiT-L at full size",
        "16 heads",
        64,
        16,
        197,
        197,
        kind="packed",
        dtypes=("bfloat16",),
        seeds=1,
    ),
)
