"""The product that Triton up to 3.7.0 miscompiles on Hopper occurs in no kernel.

``dot(trans(cast(dot(...))), x)``, the form dK = dSᵀ Q takes if dS is computed by rows of queries,
gives wrong gradients silently (fla-org/flash-linear-attention#826).
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from fastbeit_kernels._inspect.ir import Module, precisions, transposed_products

HEAD = (
    "module {\n"
    "  tt.func public @kernel(%q_ptr: !tt.ptr<bf16> {tt.divisibility = 16 : i32}, %n: i32) {\n"
    "    %zero = arith.constant dense<0.000000e+00> : tensor<64x64xf32> loc(#loc1)\n"
    "    %q = tt.load %q_ptr : tensor<64x64x!tt.ptr<bf16>> loc(#loc1)\n"
)
TAIL = "    tt.return\n  }\n}\n"
S = "    %s = tt.dot %q, %q, %zero : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>\n"
CAST = "    %c = arith.truncf %s : tensor<64x64xf32> to tensor<64x64xbf16>\n"
TURN = (
    "    %t = tt.trans %c {order = array<i32: 1, 0>} : tensor<64x64xbf16> -> tensor<64x64xbf16>\n"
)
OUT = (
    "    %o = tt.dot {0}, {1}, %zero : tensor<64x64xbf16> * tensor<64x64xbf16>"
    " -> tensor<64x64xf32>\n"
)


def test_no_kernel_multiplies_a_transposed_product(compile_report) -> None:
    several = [row for row in compile_report if len(row["products"]) > 1]
    assert {row["arch"] for row in several} == {"sm_80", "sm_90", "sm_100"}
    for row in several:
        assert row["transposed_products"] == [], f"{row['arch']} {row['dtype']} {row['name']}"


def test_a_kernel_that_does_is_found(broken_kernels) -> None:
    for name in ("turned", "turned sum"):
        (found,) = broken_kernels[name]["transposed_products"]
        assert "multiplies the transpose of" in found
    assert broken_kernels["sound on sm_90"]["transposed_products"] == []


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (S + CAST + TURN + OUT.format("%t", "%q"), 1),
        # On the right side it goes through shared memory and is right.
        (S + CAST + TURN + OUT.format("%q", "%t"), 0),
        (S + CAST + OUT.format("%c", "%q"), 0),
        (TURN.replace("%c", "%q") + OUT.format("%t", "%q"), 0),
        # Behind a loop, a branch and arithmetic.
        (
            "    %l = scf.for %i = %n to %n step %n iter_args(%a = %zero) -> (tensor<64x64xf32>) "
            " : i32 {\n"
            "      %d = tt.dot %q, %q, %a : tensor<64x64xbf16> * tensor<64x64xbf16> -> "
            "tensor<64x64xf32>\n"
            "      scf.yield %d : tensor<64x64xf32>\n    }\n"
            "    %s:2 = scf.if %n -> (tensor<64x64xf32>, i32) {\n"
            "      %m = arith.mulf %l, %l : tensor<64x64xf32>\n"
            "      scf.yield %m, %n : tensor<64x64xf32>, i32\n    } else {\n"
            "      scf.yield %zero, %n : tensor<64x64xf32>, i32\n    }\n"
            + CAST.replace("%s", "%s#0")
            + TURN
            + OUT.format("%t", "%q"),
            1,
        ),
        # A sum over a product's rows is no product any more.
        (
            S + '    %r = "tt.reduce"(%s) <{axis = 1 : i32}> ({\n'
            "    ^bb0(%x: f32, %y: f32):\n"
            "      %z = arith.addf %x, %y : f32\n"
            "      tt.reduce.return %z : f32\n"
            "    }) : (tensor<64x64xf32>) -> tensor<64xf32>\n"
            + CAST.replace("%s", "%r")
            + TURN
            + OUT.format("%t", "%q"),
            0,
        ),
    ],
)
def test_values_are_followed_to_where_they_come_from(body, found) -> None:
    assert len(transposed_products(HEAD + body + TAIL)) == found


def test_precisions_as_written() -> None:
    said = "%zero, inputPrecision = tf32 :"
    single = S.replace("bf16", "f32")
    assert precisions(HEAD + S + single.replace("%zero :", said) + single + TAIL) == [
        ("bf16", "ieee"),
        ("f32", "tf32"),
        ("f32", "ieee"),
    ]


def test_what_is_not_understood_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"scf.while is not understood"):
        Module(HEAD + "    %w = scf.while (%a = %n) : (i32) -> i32 {\n" + TAIL)
    with pytest.raises(ValueError, match="expected one function in a module"):
        Module(HEAD + TAIL.rstrip("}\n") + "\n  }\n  tt.func private @other() {\n" + TAIL)
    with pytest.raises(ValueError, match="expected an operation of MLIR, got '!!!'"):
        Module(HEAD + "    !!!\n" + TAIL)
