"""Matrix products as every kernel takes them: into fp32, never rounded to tf32."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Read where Triton reads it: when a kernel is defined.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b):
    """a @ b into fp32; fp32 operands are never rounded to tf32.

    The interpreter multiplies the bit patterns of bf16 (triton#11584), so there operands are
    widened first.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_add(a, b, sum):
    """sum + a @ b, under the same rules as :func:`dot`."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision="ieee")
    return tl.dot(a, b, sum, input_precision="ieee")
