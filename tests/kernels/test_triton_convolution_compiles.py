"""What the convolutions of the published tokenizer compile to: rules kept, work counted."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("triton")

from fastbeit_kernels._inspect.ir import Module

# What the tokenizer gives to the kernels: groups of 112 x 112 and 56 x 56 pixels.
CASES = (
    ("sm_80,sm_90,sm_100", "bf16", "dVAE (112x112, (256|64 to 256)|56x56, 128 to 512)"),
    ("sm_90", "fp16,fp32", "dVAE 112x112, 64 to 256"),
)
PRODUCTS = {"conv": 1, "conv_pointwise": 2}


@pytest.fixture(scope="module")
def rows(run_python, compile_environment, tmp_path_factory):
    found, folder = [], tmp_path_factory.mktemp("convolutions")
    for number, (archs, dtypes, match) in enumerate(CASES):
        file = folder / f"{number}.json"
        done = run_python(
            *("-m", "fastbeit_kernels.inspect", "--arch", archs, "--dtype", dtypes),
            *("--match", match, "--json", file, "--workers", "1"),
            env=compile_environment,
            expect=None,
            timeout_s=280,
        )
        assert done.returncode in (0, 1), done.stderr
        found += json.loads(file.read_text())["rows"]
    return found


def test_no_rule_is_broken(rows) -> None:
    assert {row["kernel"] for row in rows} == set(PRODUCTS)
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16", "float32"}
    broken = {f"{r['arch']} {r['dtype']} {r['name']}": r["breaches"] for r in rows if r["breaches"]}
    assert not broken, json.dumps(broken, indent=1)


def test_tensor_cores_wide_loads_and_no_stack(rows) -> None:
    for row in rows:
        label = f"{row['arch']} {row['dtype']} {row['name']}"
        assert (row["stack_bytes"], row["local_instructions"]) == (0, 0), label
        assert len(row["products"]) >= PRODUCTS[row["kernel"]], label
        assert all(p["tensor_core"] == (row["dtype"] != "float32") for p in row["products"]), label
        names = {"input_ptr", "filter_ptr"}
        if row["kernel"] == "conv_pointwise":
            names |= {"pointwise_ptr", "residual_ptr"}
        for name in names:
            assert set(row["loads"][name]["sizes"]) == {"16"}, f"{label}: {name}"


def test_counted_work(rows) -> None:
    """The first group, batch 128, bf16: FLOPs by the formula, each tensor once through memory."""
    pixels = 128 * 112 * 112
    counted = {
        "conv 3x3, ReLU in, ReLU: dVAE 112x112, 256 to 64": (
            2 * pixels * 9 * 256 * 64,
            pixels * (256 + 64) + 9 * 256 * 64 + 64,
        ),
        "conv 3x3, ReLU, 1x1, residual: dVAE 112x112, 64 to 256": (
            2 * pixels * 64 * (9 * 64 + 256),
            pixels * (64 + 2 * 256) + 64 * (9 * 64 + 256) + 64 + 256,
        ),
    }
    seen = 0
    for row in rows:
        if row["dtype"] == "bfloat16" and row["name"] in counted:
            seen += 1
            flops, numbers = counted[row["name"]]
            assert row["flops"] == flops and row["hbm_bytes"] == 2 * numbers
            assert row["padded_flops"] == flops  # 112 rows are whole groups of four
    assert seen == 2 * 3


def test_a_program_reads_its_rows_together(rows) -> None:
    """What L2 gives: 3 (R + 2) / R reads of a pixel of the input, the filters once a block."""
    for row in rows:
        if "112x112, 256 to 64" not in row["name"]:
            continue
        constants = row["constants"]
        together, pixels = constants["ROWS"], 128 * 112 * 112
        assert together == {"sm_80": 1, "sm_90": 4, "sm_100": 2}[row["arch"]]
        read = pixels * 256 * 3 * (together + 2) / together
        blocks = pixels / (together * constants["PIXELS"])
        assert row["blocks"] == blocks
        assert row["l2_bytes"] == 2 * (read + pixels * 64 + blocks * (9 * 256 * 64 + 64))


def test_operations_with_several_results_are_understood() -> None:
    """On Hopper a ReLU'd operand is split in two before its product."""
    text = (
        "module {\n"
        "  tt.func public @kernel(%a_ptr: !tt.ptr<bf16>) {\n"
        "    %x = tt.load %a_ptr : tensor<64x64x!tt.ptr<bf16>>\n"
        "    %left, %right = tt.split %x : tensor<64x32x2xbf16> -> tensor<64x32xbf16>\n"
        "    %p = tt.addptr %a_ptr, %right : !tt.ptr<bf16>, i32\n"
        "    tt.return\n  }\n}\n"
    )
    module = Module(text)
    (split,) = module.named("tt.split")
    assert split.results == ("%left", "%right")
    assert module.made_by["%right"] is split and module.sources["%left"] == ["%x"]
    assert module.origin("%p") == {"a_ptr"}
    assert re.search("tt.split", split.text)
