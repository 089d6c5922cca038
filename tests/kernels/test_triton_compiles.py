"""What the attention kernels compile to for A100 and H100, on any machine.

No spills; every product of 16-bit operands on the tensor cores, and none computed twice; 16-byte
loads; shared memory within the chip's. The compiler runs in a process of its own, because it can't
compile what this one interprets.
"""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("triton")

SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024}

COMPILE = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastbeit_kernels._launches import launches

arch, chosen = int(sys.argv[1]), sys.argv[2]
tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
seen, found = set(), []
for record in launches(f"sm_{arch}"):
    if not re.fullmatch(chosen, f"{record.dtype} {record.name}"):
        continue
    options = {"num_warps": record.launch.warps, "num_stages": record.launch.stages}
    source = ASTSource(**record.source_arguments())
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    if built.hash in seen:
        continue
    seen.add(built.hash)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found.append({
        "name": record.name, "dtype": record.dtype, "constants": record.launch.constants,
        "warps": record.launch.warps, "usage": usage, "shared": built.metadata.shared,
        "ptx": built.asm["ptx"], "ttgir": built.asm["ttgir"],
    })
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module", params=[80, 90])
def compiled(request, run_python, repo_root):
    """BEiT-B's kernels, whole and last block: bf16 and fp32, and those of the table."""
    chosen = r"(bfloat16|float32) .*(BEiT-B|12 heads).*(197x197|75x197|197 tokens)"
    done = run_python(
        "-c",
        COMPILE,
        str(request.param),
        chosen,
        env={"TRITON_INTERPRET": "0", "PYTHONPATH": f"{repo_root}:{repo_root / 'kernels'}"},
        timeout_s=280,
    )
    return request.param, json.loads(done.stdout)


def instructions(kernel, arch) -> int:
    """Tensor-core instructions of one warp (sm_80: 16x8x16) or warpgroup (sm_90: 64xNx16, N the
    whole tile), if each tile of the products is computed once."""
    constants = kernel["constants"]
    rows, columns, width = (constants[n] for n in ("ROWS", "COLUMNS", "PADDED_WIDTH"))

    def product(across, inner):
        return inner // 16 * (1 if arch == 90 else across // 8)

    def chained(keys, scores, sums):
        return scores * product(keys, width) + sums * product(width, keys) if keys else 0

    if "dK" in kernel["name"]:  # rows of the product are keys: Sᵀ, dPᵀ, then dV, dK
        assert columns == 16 * kernel["warps"]
        return chained(rows, 2, 2)
    assert rows == 16 * kernel["warps"]
    scores, sums = (2, 1) if "dQ" in kernel["name"] else (1, 1)
    return chained(columns, scores, sums) + chained(constants["TAIL"], scores, sums)


def test_compiled_code(compiled) -> None:
    arch, kernels = compiled
    assert len(kernels) >= 3 * 2 * 2 + 4
    for kernel in kernels:
        label = f"sm_{arch} {kernel['dtype']} {kernel['name']}"
        assert " STACK:0 " in kernel["usage"] and " LOCAL:0 " in kernel["usage"], label
        assert kernel["shared"] <= SHARED_MEMORY_BYTES[arch], label
        ptx = kernel["ptx"]
        if not kernel["name"].startswith("attention"):
            continue
        pattern = "wgmma.mma_async" if arch == 90 else "mma.sync"
        if kernel["dtype"] == "float32":
            assert "mma" not in ptx.replace("comma", ""), f"{label}: fp32 on tensor cores"
            continue
        assert ptx.count(pattern) == instructions(kernel, arch), label
        check_wide_loads(kernel, label)


def check_wide_loads(kernel, label) -> None:
    """Eight neighbours of every 16-bit tile (q, k, v, O, dO, bias) go to one thread, at once."""
    ttgir = kernel["ttgir"]
    layouts = dict(
        re.findall(r"^(#\w+) = #ttg.blocked<{sizePerThread = \[([\d, ]+)\]", ttgir, re.M)
    )
    loads = re.findall(
        r"(?:tt\.load|async_copy_global_to_local) .*: tensor<(\d+)x(\d+)x!tt\.ptr<b?f16>, (#\w+)>",
        ttgir,
    )
    # q and k and v at least, and what the kernel's tail and the bias add.
    assert len(loads) >= 4, label
    for rows, columns, layout in loads:
        # The last 16 keys have only four elements for each of 256 threads.
        together = min(8, int(rows) * int(columns) // (32 * kernel["warps"]))
        message = f"{label}: {rows}x{columns} by {layouts[layout]}"
        assert str(together) in layouts[layout].split(", "), message
    # A mask that splits a group of eight would make the compiler load its elements one by one.
    assert not re.search(r"ld\.global\S*\.b16", kernel["ptx"]), label
    assert re.search(r"ld\.global\S*\.v4\.b32", kernel["ptx"]), label


def test_no_transposed_cast_product_is_multiplied(compiled) -> None:
    """The pattern that Triton up to 3.7.0 miscompiles on Hopper (fla#826)."""
    _, kernels = compiled
    for kernel in kernels:
        made_by = {}
        for line in kernel["ttgir"].splitlines():
            name, equals, rest = line.strip().partition(" = ")
            if equals and name.startswith("%"):
                made_by[name.split(":")[0]] = rest

        def source(value, steps, made_by=made_by):
            """Follow the first operand of operations in ``steps`` upwards."""
            while value in made_by and made_by[value].split()[0] in steps:
                operands = [word.strip(",(){}") for word in made_by[value].split()]
                value = next((word for word in operands if word.startswith("%")), "")
            return made_by.get(value, "")

        moves = {"ttg.local_alloc", "ttg.convert_layout", "tt.trans", "ttg.memdesc_trans"}
        for value, rest in made_by.items():
            if "trans" not in rest.split()[0]:
                continue
            origin = source(value, moves)
            cast = origin.startswith(("arith.truncf", "tt.fp_to_fp"))
            assert not cast, f"{kernel['name']}: {rest} transposes {origin}"
