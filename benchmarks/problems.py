"""What is timed: attention calls of BEiT's training and evaluation, with their inputs.

Shapes: B images, Tq queries, Tk keys, T tokens, H heads, d head width, R table rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks import definition, roofline

Operation = Literal["attention", "expand", "rel_pos_attention"]


@dataclass(frozen=True)
class Problem:
    """One call. ``packed``: q, k, v are views of one ``[B, T, 3, H, d]`` leaf, as a block's linear
    layer leaves them, and their gradient comes back as one tensor. ``subset``: the queries are
    named rows of the bias, as in the last block, where only masked patches reach the loss."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    grid: tuple[int, int]
    width: int = 64
    dtype: str = "bfloat16"
    packed: bool = False
    subset: bool = False
    operation: Operation = "attention"

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the inputs that take a gradient, the bias or table last."""
        if self.operation == "expand":
            return ("table",)
        last = "table" if self.operation == "rel_pos_attention" else "bias"
        return ("qkv", last) if self.packed else ("q", "k", "v", last)

    def work(self, direction: str) -> roofline.Work:
        """Least FLOPs and bytes of ``"forward"`` or ``"backward"``."""
        rows = definition.table_rows(self.grid)
        forward = direction == "forward"
        if self.operation == "expand":
            count = roofline.expand_forward if forward else roofline.expand_backward
            return count(rows, self.keys, self.heads)
        count = roofline.attention_forward if forward else roofline.attention_backward
        total = count(
            self.batch,
            self.heads,
            self.queries,
            self.keys,
            self.width,
            element_bytes=self.torch_dtype.itemsize,
            # From the table, one perfect kernel would keep the expanded bias on the chip.
            bias_elements=self.heads * self.keys**2 if self.operation == "attention" else 0,
        )
        if self.operation == "rel_pos_attention":
            table = rows * self.heads * roofline.FLOAT_BYTES
            index = self.keys**2 * roofline.INDEX_BYTES if forward else 0
            total = total + roofline.Work(0, table + index)
        return total

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def shrunk(self) -> Problem:
        """A few images of a few tokens, for trying the code on a CPU."""
        grid, keys = (2, 3), 7
        return replace(
            self,
            batch=2,
            heads=2,
            queries=3 if self.subset else keys,
            keys=keys,
            grid=grid,
            width=16,
            dtype="float32",
        )


@dataclass
class Inputs:
    """Random inputs of one call, the leaves requiring gradients; never zeros."""

    leaves: dict[str, Tensor]
    index: Tensor
    grid: tuple[int, int]
    positions: Tensor | None
    dout: Tensor

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        if "qkv" in self.leaves:
            q, k, v = self.leaves["qkv"].unbind(2)
            return q, k, v
        return self.leaves["q"], self.leaves["k"], self.leaves["v"]

    def bytes(self) -> int:
        tensors = [*self.leaves.values(), self.dout]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def make_inputs(problem: Problem, seed: int, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    dtype = problem.torch_dtype

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    batch, heads, width = problem.batch, problem.heads, problem.width
    queries, keys = problem.queries, problem.keys
    leaves: dict[str, Tensor] = {}
    if problem.operation != "expand":
        if problem.packed:
            leaves["qkv"] = normal(batch, keys, 3, heads, width, dtype=dtype)
        else:
            for name, tokens in (("q", queries), ("k", keys), ("v", keys)):
                leaves[name] = normal(batch, tokens, heads, width, dtype=dtype)
    if problem.operation == "attention":
        # Rows a multiple of 8 apart, as the expanded table has them.
        padded = normal(heads, keys, -(-keys // 8) * 8, dtype=torch.float32)
        leaves["bias"] = padded[..., :keys]
    else:
        leaves["table"] = normal(definition.table_rows(problem.grid), heads, dtype=torch.float32)
    positions = None
    if problem.subset:
        shuffled = torch.rand(batch, keys - 1, generator=generator, device=device).argsort(1) + 1
        positions = shuffled[:, :queries].sort(1).values.to(torch.int32)
    if problem.operation == "expand":
        dout = normal(heads, keys, keys, dtype=torch.float32)
    else:
        dout = normal(batch, queries, heads * width, dtype=dtype)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    index = definition.relative_index(problem.grid, device)
    return Inputs(leaves, index, problem.grid, positions, dout)


def input_sets(
    problem: Problem, device: torch.device, cache_bytes: int, seed: int = 0
) -> list[Inputs]:
    """Sets that together are three times the cache: a round through them finds nothing in it."""
    sets = [make_inputs(problem, seed, device)]
    wanted = -(-3 * cache_bytes // max(1, sets[0].bytes()))
    # Launches of a sample are queued before it begins, and a queue holds about a thousand.
    count = min(max(2, wanted), 128)
    sets += [make_inputs(problem, seed + number, device) for number in range(1, count)]
    return sets


_BASE = Problem("BEiT-B, packed qkv", 128, 12, 197, 197, (14, 14), packed=True)
BASE_SEPARATE = replace(_BASE, name="BEiT-B, separate q k v", packed=False)
BASE_LAST = replace(BASE_SEPARATE, name="BEiT-B, last block", queries=75, subset=True)
LARGE = replace(_BASE, name="BEiT-L, packed qkv", batch=64, heads=16)
LARGE_LAST = replace(LARGE, name="BEiT-L, last block", packed=False, queries=75, subset=True)
EXPAND = replace(BASE_SEPARATE, name="expand table, 12 heads", batch=1, operation="expand")
END_TO_END = replace(_BASE, name="BEiT-B, table to output", operation="rel_pos_attention")
HALF = replace(_BASE, name="BEiT-B, packed qkv, fp16", dtype="float16")
LONG = Problem("BEiT-B at 384 pixels", 32, 12, 577, 577, (24, 24), packed=True)
LONGER = Problem("BEiT-B at 640 pixels", 8, 12, 1601, 1601, (40, 40), packed=True)
BASE = _BASE

# In order of worth.
PROBLEMS = (
    BASE,
    BASE_SEPARATE,
    BASE_LAST,
    EXPAND,
    END_TO_END,
    LARGE,
    LONG,
    LARGE_LAST,
    HALF,
    LONGER,
)


def by_name(name: str) -> Problem:
    for problem in PROBLEMS:
        if problem.name == name:
            return problem
    raise ValueError(
        f"no problem is called {name!r}; there are: "
        + "; ".join(problem.name for problem in PROBLEMS)
    )
