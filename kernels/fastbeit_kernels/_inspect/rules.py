"""What every compiled kernel must keep to; each breach is a sentence."""

from __future__ import annotations

from collections.abc import Iterator

from .compiled import Compiled, Loads
from .targets import REGISTERS_PER_THREAD, Target

HALVES = ("bf16 ", "f16 ")
# Tensors of [.., T, H, d], whose head rows lie in one piece: 16 bytes a thread, or something in
# the kernel's addressing is wrong.
WIDE = (
    *("q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "w_ptr"),
    *("input_ptr", "filter_ptr", "pointwise_ptr", "residual_ptr"),
    *("x_ptr", "branch_ptr", "y_ptr", "dy_ptr", "dnormed_ptr", "partials_ptr"),
    *("hidden_ptr", "logits_ptr", "product_ptr"),
    *("images_ptr", "read_ptr"),
)
ALWAYS_READ = (
    *("q_ptr", "k_ptr", "v_ptr", "w_ptr", "input_ptr", "filter_ptr"),
    *("images_ptr", "read_ptr"),
)
LOAD_BYTES = 16


def breaches(compiled: Compiled, target: Target) -> list[str]:
    """Everything that is wrong with one kernel; spills come under a name of their own."""
    return [*spills(compiled), *_arithmetic(compiled), *_memory(compiled, target)]


def spills(compiled: Compiled) -> Iterator[str]:
    if compiled.stack_bytes or compiled.local_instructions:
        yield (
            f"spills: {compiled.stack_bytes} bytes of stack, {compiled.local_instructions} loads "
            f"and stores of local memory, {compiled.registers} of {REGISTERS_PER_THREAD} registers"
        )


def _arithmetic(compiled: Compiled) -> Iterator[str]:
    if compiled.times_computed != 1:
        yield (
            f"a tile is computed {compiled.times_computed:g} times by {compiled.warps} warps: "
            "take 16 rows a warp, or fewer warps"
        )
    halves = sum(n for kind, n in compiled.written.items() if kind.startswith(HALVES))
    # Without tensor cores Triton widens 16-bit operands first, so elements alone don't tell.
    off = [
        product
        for product in compiled.products
        if not product.tensor_core
        and (product.element in ("bf16", "f16") or halves == sum(compiled.written.values()))
    ]
    if off:
        sizes = ", ".join(f"{p.rows}x{p.columns}x{p.depth}" for p in off)
        yield f"{len(off)} 16-bit products without tensor cores: {sizes}"
    elif halves and not compiled.mma + compiled.wgmma + compiled.tcgen05:
        yield "16-bit products, and no tensor-core instruction in the code"
    rounded = compiled.written.get("f32 tf32", 0)
    if rounded or (compiled.tf32 and "f32 tf32x3" not in compiled.written):
        yield f"{rounded} fp32 products are rounded to tf32: ask for ieee or tf32x3"
    if compiled.transposed_products:
        yield (
            "a product's transpose is multiplied, which Triton up to 3.7.0 miscompiles on Hopper: "
            + "; ".join(compiled.transposed_products)
        )


def _memory(compiled: Compiled, target: Target) -> Iterator[str]:
    if compiled.shared_bytes > target.shared_per_block:
        yield (
            f"{compiled.shared_bytes} bytes of shared memory, and a block of {target.arch} has "
            f"{target.shared_per_block}"
        )
    elif compiled.blocks_per_sm == 0:
        yield f"no block fits a multiprocessor of {target.arch}"
    for name in WIDE:
        if name not in compiled.pointers:
            continue
        if name in compiled.loads:
            yield from _narrow(name, compiled.loads[name])
        elif name in ALWAYS_READ:
            yield f"{name} is read by no load that this report knows"


def _narrow(name: str, loads: Loads) -> Iterator[str]:
    narrow = {size: count for size, count in loads.sizes.items() if size < LOAD_BYTES}
    if not narrow:
        return
    allowed = loads.narrow_tiles
    if sum(narrow.values()) > sum(allowed.values()) or min(narrow) < min(allowed):
        found = ", ".join(f"{count} of {size} bytes" for size, count in narrow.items())
        yield f"{name} is read in pieces smaller than {LOAD_BYTES} bytes a thread: {found}"
