"""The compile report: rules that training's kernels keep, and kernels that break each of them."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("triton")

from fastbeit_kernels._inspect import ptx
from fastbeit_kernels._inspect.targets import H100, TARGETS, target_of
from fastbeit_kernels._launches import launches

TENSOR_CORES = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}


def label(row) -> str:
    return f"{row['arch']} {row['dtype']} {row['name']}"


def attention(rows, dtypes=("bfloat16", "float16", "float32")):
    chosen = [r for r in rows if r["name"].startswith("attention") and r["dtype"] in dtypes]
    assert chosen
    return chosen


def test_the_report_covers_every_launch(compile_report) -> None:
    """Without this, rules would hold of nothing. In bf16, with the fp32 kernels that serve it, on
    each target; in the other dtypes on one."""
    for arch in TENSOR_CORES:
        records = launches(target_of(arch).family)
        halves = {record.launch.kernel.__name__ for record in records if record.dtype != "float32"}
        wanted = {
            (record.dtype, record.name)
            for record in records
            if arch == "sm_90"
            or record.dtype == "bfloat16"
            or record.launch.kernel.__name__ not in halves
        }
        found = {(row["dtype"], row["name"]) for row in compile_report if row["arch"] == arch}
        assert wanted <= found, (arch, wanted - found)
        assert len(wanted) > 50
    for row in attention(compile_report):
        least = 2 if row["kernel"].startswith("attention_forward") else 3
        assert len(row["products"]) >= least, label(row)
        assert {"q_ptr", "k_ptr", "v_ptr"} <= set(row["loads"]), label(row)


def test_no_rule_is_broken(compile_report) -> None:
    broken = {label(row): row["breaches"] for row in compile_report if row["breaches"]}
    assert not broken, json.dumps(broken, indent=1)


def test_no_spills(compile_report) -> None:
    for row in compile_report:
        spilled = (row["stack_bytes"], row["local_instructions"])
        assert spilled == (0, 0) or row["fallback"], label(row)


def test_no_tile_is_computed_twice(compile_report) -> None:
    for row in attention(compile_report):
        assert row["times_computed"] == 1, label(row)
        assert all(product["times"] == 1 for product in row["products"]), label(row)


def test_attention_has_the_products_of_its_formulas_and_no_more(compile_report) -> None:
    """Tensor-core instructions of a warp (sm_80: 16x8x16) or of four (sm_90: 64 rows, 16 deep, N
    the whole tile), counted from the tiles' sizes. fp32 uses none."""
    seen = set()
    for row in attention(compile_report):
        if row["dtype"] == "float32":
            assert row["mma"] + row["wgmma"] + row["tcgen05"] == 0, label(row)
            continue
        if row["arch"] == "sm_100":
            continue
        sizes = row["constants"]
        tall, wide, width = (sizes[name] for name in ("ROWS", "COLUMNS", "PADDED_WIDTH"))
        over = 1 if row["arch"] == "sm_90" else 8

        def product(across, depth, over=over):
            return depth // 16 * (1 if over == 1 else across // over)

        # Products that give scores, and that are summed over them.
        scores, sums, blocks = {
            "attention_forward": (1, 1, 1),
            "attention_forward_rows": (1, 1, sizes.get("BLOCKS")),
            "attention_backward_queries": (2, 1, 1),
            "attention_backward_keys": (2, 2, 1),
        }[row["kernel"]]
        if row["kernel"] == "attention_backward_keys":
            tall, wide = wide, tall
        assert tall == 16 * row["warps"], label(row)
        counted = 0
        for tile, times in ((wide, blocks), (sizes.get("TAIL", 0), 1)):
            if tile:
                each = scores * product(tile, width) + sums * product(width, tile)
                counted += times * each
        assert row[TENSOR_CORES[row["arch"]]] == counted, label(row)
        seen.add((row["arch"], row["kernel"]))
    assert len(seen) == 3 + 4


def test_16_bit_products_run_on_tensor_cores(compile_report) -> None:
    for row in attention(compile_report, ("bfloat16", "float16")):
        assert all(product["tensor_core"] for product in row["products"]), label(row)
        assert row[TENSOR_CORES[row["arch"]]] >= len(row["products"]), label(row)


def test_fp32_products_are_never_rounded_to_tf32(compile_report) -> None:
    for row in attention(compile_report, ("float32",)):
        assert set(row["written"]) <= {"f32 ieee", "f32 tf32x3"}, label(row)
        assert row["tf32"] == 0 or "f32 tf32x3" in row["written"], label(row)


def test_shared_memory_and_registers_fit(compile_report) -> None:
    for row in compile_report:
        assert row["shared_bytes"] <= target_of(row["arch"]).shared_per_block, label(row)
        assert row["blocks_per_sm"] >= 1, label(row)


def test_q_k_v_are_read_16_bytes_at_a_time(compile_report) -> None:
    for row in attention(compile_report):
        for name in ("q_ptr", "k_ptr", "v_ptr"):
            sizes = {int(size): count for size, count in row["loads"][name]["sizes"].items()}
            narrow = sum(count for size, count in sizes.items() if size < 16)
            tiles = row["loads"][name]["narrow_tiles"]
            assert 16 in sizes and narrow <= sum(tiles.values()), f"{label(row)}: {name} {sizes}"


def test_bias_output_and_its_gradient_are_read_16_bytes_at_a_time(compile_report) -> None:
    """A mask that splits a group of eight would have the elements loaded one by one."""
    seen = set()
    for row in attention(compile_report, ("bfloat16", "float16")):
        wanted = {"dout_ptr", "out_ptr"} if row["kernel"] == "attention_backward_queries" else set()
        wanted |= {"dout_ptr"} if row["kernel"] == "attention_backward_keys" else set()
        wanted |= {"bias_ptr"} if row["constants"]["BIAS"] else set()
        for name in wanted:
            assert set(row["loads"][name]["sizes"]) == {"16"}, f"{label(row)}: {name}"
            seen.add((row["kernel"], name))
    assert len(seen) == 7


def test_counted_work(compile_report) -> None:
    """BEiT-B, batch 128: FLOPs by the formula, bytes tensor by tensor."""
    names = {
        "attention forward: BEiT-B, 197x197": (2, 4, 1),
        "attention dQ: BEiT-B, 197x197": (3, 6, 2),
    }
    pairs, tokens = 128 * 12 * 197 * 197, 128 * 12 * 197
    seen = 0
    for row in compile_report:
        if row["name"] not in names or row["arch"] != "sm_90" or row["dtype"] != "bfloat16":
            continue
        seen += 1
        products, tensors, vectors = names[row["name"]]
        assert row["flops"] == products * 2 * 64 * pairs
        bias_bytes = 12 * 197 * 197 * 2
        wanted = tensors * tokens * 64 * 2 + vectors * tokens * 4 + bias_bytes
        assert row["hbm_bytes"] == wanted
        assert row["limit_us"] == pytest.approx(max(row["flops"] / 798e6, wanted / 3e6))
        assert row["limit_us"] <= row["tiled_us"]
    assert seen == 2
    for row in compile_report:
        assert row["l2_bytes"] >= row["hbm_bytes"] or not row["products"], label(row)
        assert row["padded_flops"] >= row["flops"] or not row["products"], label(row)


def test_sound_kernels_break_no_rule(broken_kernels) -> None:
    sound = {name: row["breaches"] for name, row in broken_kernels.items() if "sound" in name}
    assert sound == {f"sound {where}": [] for where in (
        "on sm_80", "on sm_90", "on sm_100", "in fp32", "in tf32x3",
    )}  # fmt: skip
    assert broken_kernels["sound in tf32x3"]["tf32"] > 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("spills", "spills: "),
        ("twice on sm_80", "a tile is computed 2 times by 8 warps"),
        ("twice on sm_90", "a tile is computed 2 times by 8 warps"),
        ("twice in fp32", "a tile is computed 2 times by 16 warps"),
        ("no tensor cores", "2 16-bit products without tensor cores: 32x16x32, 32x32x16"),
        ("tf32", "2 fp32 products are rounded to tf32"),
        ("narrow", "q_ptr is read in pieces smaller than 16 bytes a thread"),
        ("shared", "bytes of shared memory, and a block of sm_86 has 101376"),
        ("turned", "a product's transpose is multiplied"),
        ("turned sum", "a product's transpose is multiplied"),
    ],
)
def test_each_rule_can_be_broken(broken_kernels, name, sentence) -> None:
    """Each kernel breaks its own rule, and no other."""
    (breach,) = broken_kernels[name]["breaches"]
    assert sentence in breach


def test_instructions_alone_show_a_tile_computed_twice(broken_kernels) -> None:
    """The count of instructions against the tiles' size, without what layouts say."""
    row = broken_kernels["twice on sm_80"]
    work = sum(p["rows"] * p["columns"] * p["depth"] for p in row["products"])
    assert row["mma"] * row["warps"] * 16 * 8 * 16 == 2 * work


def test_blocks_a_multiprocessor_holds() -> None:
    """By hand, from the limits of the CUDA programming guide."""
    h100, a100 = target_of("sm_90"), target_of("sm_80")
    # 132 registers take 4,352 a warp: three warps a scheduler, twelve in all.
    assert h100.blocks_at_once(132, 65536, 8) == 1
    assert h100.blocks_at_once(128, 65536, 8) == 2
    assert a100.blocks_at_once(160, 20480, 4) == 3
    assert a100.blocks_at_once(32, 0, 4) == 16
    # Shared memory: 163 KB and the 1 KB that CUDA keeps are all an A100 has.
    assert a100.blocks_at_once(32, 163 * 1024, 4) == 1
    assert a100.blocks_at_once(32, 82 * 1024, 4) == 1
    assert a100.blocks_at_once(32, 81 * 1024, 4) == 2
    assert target_of("sm_100").blocks_at_once(32, 0, 4, columns=256) == 2
    small = dataclasses.replace(h100, warps_per_sm=4)
    assert small.blocks_at_once(32, 0, 8) == 0
    with pytest.raises(ValueError, match=r"arch must be one of sm_80, .*, got 'sm_75'"):
        target_of("sm_75")
    assert all(target.arch == arch for arch, target in TARGETS.items())
    assert (H100.half_tflops, H100.memory_tb_per_s) == (798, 3.0)


def test_loads_are_told_apart_by_the_argument_they_read() -> None:
    code = """
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    ld.param.b32 %r1, [kernel_param_2];
    mov.u32 %r2, %tid.x;
    mad.lo.s32 %r3, %r2, %r1, 4;
    mad.wide.s32 %rd3, %r3, 2, %rd1;
    @%p1 ld.global.L1::evict_last.v4.b32 { %r4, %r5, %r6, %r7 }, [ %rd3 + 16 ];
    ld.global.b16 %rs1, [ %rd3 + 0 ];
    mul.wide.s32 %rd4, %r4, 2;
    add.s64 %rd5, %rd2, %rd4;
    cp.async.cg.shared.global [ %r9 + 0 ], [ %rd5 + 0 ], 0x10, %r8;
    @%p2 cp.async.ca.shared.global [ %r9 + 0 ], [ %rd5 + 0 ], 0x4;
    """
    assert ptx.loads(code, ["q_ptr", "k_ptr", "q_token"]) == {
        "q_ptr": {16: 1, 2: 1},
        # What was read through q, and now is an offset into k, does not make it a read of q.
        "k_ptr": {16: 1, 4: 1},
    }


def test_the_command_refuses_what_it_cannot_do(run_python, repo_root) -> None:
    path = {"PYTHONPATH": f"{repo_root}:{repo_root / 'kernels'}"}
    command = ("-m", "fastbeit_kernels.inspect")
    done = run_python(*command, env={**path, "TRITON_INTERPRET": "1"}, expect=2)
    assert "TRITON_INTERPRET is set, and Triton can't compile then; unset it" in done.stderr
    path["TRITON_INTERPRET"] = "0"
    done = run_python(*command, "--arch", "sm_90,sm_75", env=path, expect=2)
    assert "arch must be one of sm_80" in done.stderr and "got 'sm_75'" in done.stderr
    done = run_python(*command, "--dtype", "bf16,int8", env=path, expect=2)
    assert "--dtype must be of bf16, fp16, fp32, got int8" in done.stderr
    done = run_python(*command, "--match", "no such launch", env=path, expect=2)
    assert "no launch matches 'no such launch'" in done.stderr
    hidden = "import sys; sys.modules['triton'] = None\n"
    code = hidden + "from fastbeit_kernels.inspect import main; sys.exit(main([]))"
    assert "triton is not installed" in run_python("-c", code, env=path, expect=2).stderr


def test_tables_and_files(run_python, compile_environment, tmp_path) -> None:
    done = run_python(
        *("-m", "fastbeit_kernels.inspect", "--arch", "sm_80", "--dtype", "fp32", "--workers", "1"),
        *("--match", "table by grid: 12 heads, 197", "--markdown", tmp_path / "report.md"),
        *("--json", tmp_path / "report.json"),
        env=compile_environment,
    )
    assert "compiled, not measured" in done.stdout
    assert "sm_80 (A100 SXM 80 GB), float32" in done.stdout
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["kernel"] == "reduce_to_table" and row["constants"]["HEIGHT"] == 14
    text = (tmp_path / "report.md").read_text()
    assert "Compiled, not measured" in text and "No kernel ran" in text
    assert f"| reduce to table by grid: 12 heads, 197 tokens | {row['registers']} | 0 | 0 |" in text
    assert "| sm_80 | A100 SXM 80 GB | 312 | 19.5 | 2.039 | 7.2 |" in text
