"""Small kernels that break one rule of the compile report each, and one that breaks none.

A script, run where Triton compiles: prints what the report reads from each, as JSON.
"""

import dataclasses
import json

import triton
import triton.language as tl
from triton.runtime import driver

from fastbeit_kernels._inspect.compiled import compile_source
from fastbeit_kernels._inspect.rules import breaches
from fastbeit_kernels._inspect.targets import H100, KIB, Target, target_of

VOLTA = Target("sm_70", "sm_70", 64, 32, 96 * KIB, 96 * KIB, H100)


@triton.jit
def rows_of(base, stride, rows, SIZE: tl.constexpr):
    return tl.load(base + rows[:, None] * stride + tl.arange(0, SIZE)[None, :])


@triton.jit
def chained(
    q_ptr, k_ptr, v_ptr, out_ptr, q_token, keys,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    PRECISION: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """(q kᵀ) v, or, TURNED, (k qᵀ)ᵀ v; over blocks of keys."""
    rows = tl.arange(0, ROWS)
    q = rows_of(q_ptr, q_token, rows, SIZE)
    out = tl.zeros([ROWS, SIZE], tl.float32)
    for start in range(0, keys, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = rows_of(k_ptr, SIZE, columns, SIZE)
        v = rows_of(v_ptr, SIZE, columns, SIZE)
        if TURNED:
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * 2.0
            p = tl.trans(s.to(v.dtype))
        else:
            p = (tl.dot(q, tl.trans(k), input_precision=PRECISION) * 2.0).to(v.dtype)
        out = tl.dot(p, v, out, input_precision=PRECISION)
    tl.store(out_ptr + rows[:, None] * SIZE + tl.arange(0, SIZE)[None, :], out)


@triton.jit
def turned_sum(q_ptr, k_ptr, v_ptr, out_ptr, q_token, keys, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """A product summed over a loop, then its transpose multiplied: the pattern behind a loop."""
    rows = tl.arange(0, ROWS)
    s = tl.zeros([ROWS, ROWS], tl.float32)
    for start in range(0, keys, SIZE):
        q = rows_of(q_ptr + start, q_token, rows, SIZE)
        s = tl.dot(q, tl.trans(rows_of(k_ptr + start, q_token, rows, SIZE)), s)
    if keys > 7:
        s = s * 3.0
    v = rows_of(v_ptr, SIZE, rows, SIZE)
    out = tl.dot(tl.trans(s.to(v.dtype)), v)
    tl.store(out_ptr + rows[:, None] * SIZE + tl.arange(0, SIZE)[None, :], out)


@triton.jit
def wide_rows(q_ptr, out_ptr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """A softmax of more numbers than its threads have registers for."""
    place = tl.arange(0, ROWS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(q_ptr + place)
    p = tl.exp(x - tl.max(x, 1)[:, None])
    tl.store(out_ptr + place, p / tl.sum(p, 1)[:, None])


def compiled(kernel, target, warps=4, stages=2, element="bf16", unaligned=(), **constants):
    """Pointers are of ``element``, numbers i32; all are multiples of 16 but those ``unaligned``."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = "*fp32" if name == "out_ptr" else f"*{element}"
        signature[name] = kind if name.endswith("_ptr") else "i32"
        if name not in unaligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    arguments = {
        "fn": kernel,
        "signature": signature,
        "constexprs": {(kernel.arg_names.index(n),): value for n, value in constants.items()},
        "attrs": attributes,
    }
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    target = target if isinstance(target, Target) else target_of(target)
    found, _ = compile_source(arguments, options, target)
    return {**dataclasses.asdict(found), "breaches": breaches(found, target)}


def main():
    def no_driver(_):
        raise RuntimeError("the report asked for a GPU driver")

    type(driver).active = property(no_driver)
    tile = {"ROWS": 64, "COLUMNS": 32, "SIZE": 64, "PRECISION": "ieee", "TURNED": False}
    small = tile | {"ROWS": 32, "COLUMNS": 16, "SIZE": 32}

    def rounded(precision):
        return small | {"ROWS": 64, "PRECISION": precision}

    results = {
        "sound on sm_80": compiled(chained, "sm_80", **tile),
        "sound on sm_90": compiled(chained, "sm_90", **tile),
        "sound on sm_100": compiled(chained, "sm_100", **(tile | {"ROWS": 128})),
        "sound in fp32": compiled(chained, "sm_90", element="fp32", **small),
        "sound in tf32x3": compiled(chained, "sm_80", element="fp32", **rounded("tf32x3")),
        "tf32": compiled(chained, "sm_80", element="fp32", **rounded("tf32")),
        "twice on sm_80": compiled(chained, "sm_80", warps=8, **tile),
        "twice on sm_90": compiled(chained, "sm_90", warps=8, **tile),
        "twice in fp32": compiled(
            chained, "sm_80", warps=16, element="fp32", **(small | {"ROWS": 16, "SIZE": 16})
        ),
        "narrow": compiled(chained, "sm_90", unaligned=("q_token",), **tile),
        "shared": compiled(chained, "sm_86", stages=5, **(tile | {"COLUMNS": 128, "SIZE": 128})),
        "no tensor cores": compiled(chained, VOLTA, element="fp16", **small),
        "turned": compiled(chained, "sm_90", **(tile | {"COLUMNS": 64, "TURNED": True})),
        "turned sum": compiled(turned_sum, "sm_90", ROWS=64, SIZE=64),
        "spills": compiled(wide_rows, "sm_90", warps=1, element="fp32", ROWS=64, SIZE=256),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
