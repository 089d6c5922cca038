"""The compile report: rules that training's kernels keep, and kernels that break each of them."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("triton")

from fastbeit_kernels._inspect import ptx
from fastbeit_kernels._inspect.targets import H100, TARGETS, target_of

KERNELS = {
    "attention_forward",
    "attention_backward_queries",
    "attention_backward_keys",
    "bias_gradient_sum",
    "expand_table",
    "reduce_to_table",
}
TENSOR_CORES = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}


def label(row) -> str:
    return f"{row['arch']} {row['dtype']} {row['name']}"


def attention(rows, dtypes=("bfloat16", "float16", "float32")):
    chosen = [r for r in rows if r["name"].startswith("attention") and r["dtype"] in dtypes]
    assert chosen
    return chosen


def test_the_report_covers_what_training_launches(compile_report) -> None:
    """Without this, rules would hold of nothing."""
    for arch in ("sm_80", "sm_90", "sm_100"):
        rows = [row for row in compile_report if row["arch"] == arch]
        assert {row["kernel"] for row in rows} >= KERNELS - {
            # fp32 rows were asked for on one target only.
            "bias_gradient_sum" if arch != "sm_90" else "",
            *(("expand_table", "reduce_to_table") if arch != "sm_90" else ()),
        }, arch
        for model in ("BEiT-B", "BEiT-L"):
            for last in ("", ", last block"):
                halves = [r for r in attention(rows) if f": {model}{last}, " in r["name"]]
                assert len([r for r in halves if r["dtype"] == "bfloat16"]) >= 3
    on_one = {row["dtype"] for row in compile_report if row["arch"] == "sm_90"}
    assert on_one == {"bfloat16", "float16", "float32"}
    for row in attention(compile_report):
        assert len(row["products"]) >= {"attention_forward": 2}.get(row["kernel"], 3), label(row)
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
