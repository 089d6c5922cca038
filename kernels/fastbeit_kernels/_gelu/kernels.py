"""GELU (exact) of s = x + bias, forward and backward. With Φ and φ of the normal distribution:

    out = s Φ(s)      dx = dout (Φ(s) + s φ(s))      dbias = sum over rows of dx

fp32 takes Φ from erf, as PyTorch does (so does the backward of 16 bits with an fp32 bias, whose
gradient is in fp32). For 16-bit results erf's two branches are a third of all
instructions, so there Q(z) = 1 - Φ(z), z >= 0, is 2 to the power of a polynomial: 2e-16 of full
scale past z = 6, and before it 6.4e-6 of itself (fp16 rounds to 4.9e-4). It has no cancellation, so
that far down the negative side it is closer than 1 + erf.

The backward kernel reads x and dout once, and keeps its share of dbias in registers;
``column_sums`` adds the shares in fixed order.

Shapes: r rows and c columns of a tile; R rows, N columns in all.
"""

from __future__ import annotations

import triton
import triton.language as tl

# log2 Q(z) on [0, 6], degree 7: least squares on 4,000 Chebyshev nodes, reweighted towards the
# smallest largest error (Lawson), here 3.3e-6 of Q. Its last coefficient is negative, so beyond 6
# it falls on, and infinity gives Q = 0.
Q0 = tl.constexpr(-9.99995294e-01)
Q1 = tl.constexpr(-1.15125105)
Q2 = tl.constexpr(-4.58464392e-01)
Q3 = tl.constexpr(-5.39600701e-02)
Q4 = tl.constexpr(8.50789131e-03)
Q5 = tl.constexpr(-9.30524934e-04)
Q6 = tl.constexpr(6.15983034e-05)
Q7 = tl.constexpr(-1.83481187e-06)
SQRT_HALF = tl.constexpr(0.7071067811865476)
# φ(s) = exp(-s²/2) / sqrt(2π) = 2**(HALF_LOG2_E s² + LOG2_PEAK)
HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
LOG2_PEAK = tl.constexpr(-1.3257480647361593)


@triton.jit
def normal_share(s, EXACT: tl.constexpr):
    """Φ(s)."""
    if EXACT:
        return 0.5 * (1.0 + tl.erf(s * SQRT_HALF))
    z = tl.abs(s)
    power = Q7 * z + Q6
    power = power * z + Q5
    power = power * z + Q4
    power = power * z + Q3
    power = power * z + Q2
    power = power * z + Q1
    power = power * z + Q0
    above = tl.exp2(power)
    return tl.where(s > 0, 1.0 - above, above)


@triton.jit
def load_bias(
    bias_ptr, columns, exists, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Beside every row of the tile; zeros where there is no bias.

    Each thread loads its own columns, from L1 where another has been: a row loaded once would come
    to the other threads through shared memory and a barrier.
    """
    if BIAS:
        pointers = tl.broadcast_to((bias_ptr + columns)[None, :], [ROWS, COLUMNS])
        mask = tl.broadcast_to(exists[None, :], [ROWS, COLUMNS])
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def bias_gelu_forward(
    x_ptr,
    bias_ptr,
    out_ptr,
    x_row,
    rows,
    width,
    BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile a program; ``out`` is contiguous."""
    blocks = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    columns = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = columns < width
    inside = (row < rows)[:, None] & exists[None, :]
    bias_rc = load_bias(bias_ptr, columns, exists, BIAS, ROWS, COLUMNS)
    x_rc = tl.load(x_ptr + row[:, None] * x_row + columns[None, :], mask=inside, other=0.0)
    s_rc = x_rc.to(tl.float32) + bias_rc
    out_rc = s_rc * normal_share(s_rc, EXACT)
    pointers = out_ptr + row[:, None] * width + columns[None, :]
    tl.store(pointers, out_rc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def bias_gelu_backward(
    dout_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    shares_ptr,
    dout_row,
    x_row,
    rows,
    width,
    stretch,
    BIAS: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``stretch`` rows of COLUMNS columns a program; ``shares`` is fp32 ``[stretches, N]``."""
    blocks = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    columns = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    share = program // blocks
    first = share * stretch
    last = tl.minimum(first + stretch, rows)
    exists = columns < width
    bias_rc = load_bias(bias_ptr, columns, exists, BIAS, ROWS, COLUMNS)
    sums_rc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & exists[None, :]
        row = row.to(tl.int64)[:, None]
        x_rc = tl.load(x_ptr + row * x_row + columns[None, :], mask=inside, other=0.0)
        dout_rc = tl.load(dout_ptr + row * dout_row + columns[None, :], mask=inside, other=0.0)
        s_rc = x_rc.to(tl.float32) + bias_rc
        peak_rc = tl.exp2(s_rc * s_rc * HALF_LOG2_E + LOG2_PEAK)
        dx_rc = dout_rc.to(tl.float32) * (normal_share(s_rc, EXACT) + s_rc * peak_rc)
        rounded_rc = dx_rc.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row * width + columns[None, :], rounded_rc, mask=inside)
        if BIAS_GRADIENT:
            sums_rc += dx_rc
    if BIAS_GRADIENT:
        pointers = shares_ptr + share.to(tl.int64) * width + columns
        tl.store(pointers, tl.sum(sums_rc, 0), mask=exists)


@triton.jit
def column_sums(shares_ptr, dbias_ptr, width, shares, COLUMNS: tl.constexpr, SHARES: tl.constexpr):
    """dbias ``[N]``: SHARES shares at a time, in order, then over these."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns < width
    sums = tl.zeros([SHARES, COLUMNS], tl.float32)
    for start in range(0, shares, SHARES):
        share = start + tl.arange(0, SHARES)
        mask = (share < shares)[:, None] & exists[None, :]
        pointers = shares_ptr + share.to(tl.int64)[:, None] * width + columns[None, :]
        sums += tl.load(pointers, mask=mask, other=0.0)
    total = tl.sum(sums, 0).to(dbias_ptr.dtype.element_ty)
    tl.store(dbias_ptr + columns, total, mask=exists)
