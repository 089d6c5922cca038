"""Compile one launch for a target, on any machine, and read off what became of it.

No GPU driver is touched: Triton's compiler, its ``ptxas`` and its ``cuobjdump`` come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import ir, ptx
from .targets import WARP, Target


@dataclass(frozen=True)
class Product:
    """One ``tl.dot`` of a kernel as compiled: [rows, depth] @ [depth, columns]."""

    rows: int
    columns: int
    depth: int
    element: str
    tensor_core: bool
    times: int
    """How often warps compute each of its elements, by the layout of the result."""


@dataclass(frozen=True)
class Loads:
    """How one tensor is read, by instructions in the code.

    ``sizes``: bytes a thread takes at once → instructions. ``narrow_tiles``: reads of tiles too
    small to give each thread 16 bytes, in bytes → how many; such a read is as wide as can be.
    """

    sizes: dict[int, int]
    narrow_tiles: dict[int, int]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    arch: str
    triton: str
    registers: int
    stack_bytes: int
    local_instructions: int
    shared_bytes: int
    tensor_memory_columns: int
    warps: int
    barriers: int
    blocks_per_sm: int
    mma: int
    wgmma: int
    tcgen05: int
    tf32: int
    products: tuple[Product, ...]
    times_computed: float
    """The largest factor by which some product is computed more often than once."""
    written: dict[str, int]
    """Products as the kernel's source has them: element and input precision → how many."""
    transposed_products: tuple[str, ...]
    pointers: tuple[str, ...]
    """The kernel's pointer arguments."""
    loads: dict[str, Loads]

    @property
    def tensor_instructions(self) -> str:
        counts = {"mma": self.mma, "wgmma": self.wgmma, "tcgen05": self.tcgen05}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "–"


def compile_source(
    arguments: dict[str, Any], options: dict[str, Any], target: Target
) -> tuple[Compiled, Any]:
    """Compile for ``target``; the second result is Triton's kernel, with its ``asm``.

    Args:
        arguments: of ``triton.compiler.ASTSource``.
        options: as a launch gives them (``Launch.options``).
    """
    kernel = triton.compile(
        ASTSource(**arguments), target=GPUTarget("cuda", target.capability, WARP), options=options
    )
    return read_kernel(kernel, arguments["signature"], target), kernel


def read_kernel(kernel: Any, signature: dict[str, str], target: Target) -> Compiled:
    parameters = [name for name, kind in signature.items() if kind != "constexpr"]
    warps = kernel.metadata.num_warps
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    usage = resource_usage(kernel.asm["cubin"])
    code = ptx.tensor_instructions(kernel.asm["ptx"], warps)
    products = read_products(kernel.asm["ttgir"], warps)
    written = ir.precisions(kernel.asm["ttir"])
    return Compiled(
        arch=target.arch,
        triton=triton.__version__,
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        local_instructions=usage["LOCAL_INSTRUCTIONS"],
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=columns,
        warps=warps,
        barriers=ptx.barriers(kernel.asm["ptx"]),
        blocks_per_sm=target.blocks_at_once(usage["REG"], kernel.metadata.shared, warps, columns),
        mma=code.mma,
        wgmma=code.wgmma,
        tcgen05=code.tcgen05,
        tf32=code.tf32,
        products=products,
        times_computed=times_computed(products, kernel.asm["ttgir"], code),
        written=dict(Counter(f"{element} {said}" for element, said in written)),
        transposed_products=tuple(ir.transposed_products(kernel.asm["ttir"])),
        pointers=tuple(name for name in parameters if signature[name].startswith("*")),
        loads=read_loads(kernel.asm["ttgir"], kernel.asm["ptx"], parameters, warps),
    )


def cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, SHARED of a kernel, and how many instructions access local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = cuobjdump("--dump-resource-usage", file.name)
        usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
        # Local memory is reached through the stack alone; disassembling takes as long as compiling.
        code = cuobjdump("-sass", file.name) if usage["STACK"] or usage["LOCAL"] else ""
    usage["LOCAL_INSTRUCTIONS"] = len(re.findall(r"\b(?:STL|LDL)\b", code))
    return usage


def read_products(ttgir: str, warps: int) -> tuple[Product, ...]:
    layouts = dict(re.findall(r"^(#\w+) = (#.*)$", ttgir, re.M))
    found = []
    for product in ir.Module(ttgir).named(*ir.PRODUCTS):
        (left, element, _), (right, _, _) = ir.shapes(product.text)[:2]
        (rows, depth), columns = left[-2:], right[-1]
        layout = layouts.get(ir.shapes(product.text)[2][2], "")
        on_tensor_cores = "blocked" not in layout
        times = layout_times(layout, rows, columns)
        found.append(Product(rows, columns, depth, element, on_tensor_cores, times))
    return tuple(found)


def layout_times(layout: str, rows: int, columns: int) -> int:
    """How often a result in ``layout`` holds each of its elements.

    Each warp of a tensor-core product has 16 rows by the instruction's columns; what all warps
    cover beyond the tile's sides is the tile over again. (Tensor memory holds a tile once.)
    """
    numbers = {
        name: [int(number) for number in values.split(",")]
        for name, values in re.findall(r"(\w+) = \[([\d, ]+)\]", layout)
    }
    if "blocked" in layout:
        parts = zip(
            numbers["sizePerThread"], numbers["threadsPerWarp"], numbers["warpsPerCTA"], strict=True
        )
        covered = [size * threads * warps for size, threads, warps in parts]
    elif "nvidia_mma" in layout:
        shape = zip(numbers["warpsPerCTA"], numbers["instrShape"], strict=False)
        covered = [warps * size for warps, size in shape]
    else:
        return 1
    return max(1, covered[0] // rows) * max(1, covered[1] // columns)


def times_computed(
    products: tuple[Product, ...], ttgir: str, code: ptx.TensorInstructions
) -> float:
    """By layout, and by the number of tensor-core instructions against what the tiles need."""
    factors = [float(product.times) for product in products]
    on_cores = [product for product in products if product.tensor_core]
    if on_cores and code.tcgen05:
        needed = tensor_memory_instructions(ttgir)
        factors.append(code.tcgen05 / needed)
    elif on_cores and "tf32x3" not in ttgir:
        needed = sum(product.rows * product.columns * product.depth for product in on_cores)
        factors.append(code.work / needed)
    return max(factors, default=1.0)


def tensor_memory_instructions(ttgir: str) -> int:
    """tcgen05.mma that the products need: 32 bytes of depth and one block of the result each."""
    blocks = {
        name: (int(rows), int(columns))
        for name, rows, columns in re.findall(
            r"^(#\w+) = .*tensor_memory_encoding<blockM = (\d+), blockN = (\d+)", ttgir, re.M
        )
    }
    needed = 0
    for product in ir.Module(ttgir).named("ttng.tc_gen5_mma"):
        (left, element, _), (right, _, _), (_, _, layout) = ir.shapes(product.text)[:3]
        rows, columns = blocks[layout]
        depth = 32 // ir.ELEMENT_BYTES[element]
        needed += -(-left[0] // rows) * -(-right[1] // columns) * -(-left[1] // depth)
    return needed


def read_loads(ttgir: str, code: str, parameters: list[str], warps: int) -> dict[str, Loads]:
    narrow: dict[str, Counter[int]] = {}
    module = ir.Module(ttgir)
    for load in module.named(*ir.LOADS):
        named = ir.shapes(load.text)
        if not named:
            continue
        sides, element, _ = named[0]
        elements = 1
        for side in sides:
            elements *= side
        size = elements * ir.ELEMENT_BYTES[element] // (WARP * warps)
        for argument in module.origin(load.operands[0]) if size < 16 else ():
            narrow.setdefault(argument, Counter())[max(size, 1)] += 1
    return {
        argument: Loads(dict(sorted(sizes.items())), dict(sorted(narrow.get(argument, {}).items())))
        for argument, sizes in ptx.loads(code, parameters).items()
    }
