"""Attention: what is checked, what is timed, and what is wanted of it."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.operation import Case, Problem
from benchmarks.operations.attention.shapes import Attention
from benchmarks.targets import Against, AtMost, Target

ONCE = ("bfloat16",)
TABLE = ("float32",)
SQUARE, OBLONG = (14, 14), (5, 7)
# In order of worth. The full sizes are those that training launches; the rest are the edges.
CASES = (
    Case(
        "BEiT at 224 pixels",
        "three blocks of keys and a narrow last one",
        Attention(3, 3, 197, 197, kind="packed"),
        machinery=True,
    ),
    Case(
        "query subset",
        "75 of 197 rows, empty slots",
        Attention(3, 2, 75, 197, subset=True, grid=SQUARE, kind="table"),
        machinery=True,
        sanitized=True,
    ),
    Case(
        "BEiT-B at full size",
        "slices of dBias, grid of a whole GPU",
        Attention(128, 12, 197, 197, kind="packed"),
        ONCE,
        1,
    ),
    Case(
        "BEiT-B last block at full size",
        "the same with positions",
        Attention(128, 12, 75, 197, subset=True),
        ONCE,
        1,
    ),
    Case(
        "table to output",
        "the table's gradient",
        Attention(4, 3, 197, 197, grid=SQUARE, kind="packed table"),
        machinery=True,
    ),
    Case(
        "5 x 7 grid",
        "a window that is no square",
        Attention(3, 3, 36, 36, grid=OBLONG, kind="table"),
        sanitized=True,
    ),
    Case(
        "expand 14 x 14",
        "the table alone",
        Attention(1, 12, 197, 197, grid=SQUARE, kind="expand"),
        TABLE,
    ),
    Case("577 tokens", "384 pixels: the online path", Attention(2, 2, 577, 577)),
    Case("1601 tokens", "640 pixels", Attention(1, 2, 1601, 1601, kind="packed")),
    Case("50 tokens", "patches of 32, no bias", Attention(3, 3, 50, 50, bias="none")),
    Case(
        "65 tokens", "a tile and one key, a bias an image", Attention(3, 2, 65, 65, bias="images")
    ),
    Case("one query", "a row alone, heads no power of two", Attention(3, 2, 1, 40, width=48)),
    Case("batch 1", "nothing to sum over", Attention(1, 3, 197, 197, bias="all")),
    Case("wide heads", "d = 128, whole tiles of keys", Attention(2, 2, 65, 128, width=128)),
    Case("narrow heads", "d = 16, a bias by key", Attention(2, 4, 33, 50, width=16, bias="keys")),
    Case("head width 80", "padded heads", Attention(2, 2, 50, 197, width=80)),
    Case(
        "expand 5 x 7",
        "a window that is no square",
        Attention(1, 3, 36, 36, grid=OBLONG, kind="expand"),
        TABLE,
    ),
    Case("BEiT-L at full size", "16 heads", Attention(64, 16, 197, 197, kind="packed"), ONCE, 1),
)

_BASE = Attention(128, 12, 197, 197, kind="packed", aligned=True)
_SEPARATE = replace(_BASE, kind="attention")
_LAST = replace(_SEPARATE, queries=75, subset=True, empty=False)
_LARGE = replace(_BASE, batch=64, heads=16)

BASE = Problem("BEiT-B, packed qkv", _BASE, worth=0)
BASE_SEPARATE = Problem("BEiT-B, separate q k v", _SEPARATE, worth=0)
BASE_LAST = Problem("BEiT-B, last block", _LAST, worth=0)
EXPAND = Problem(
    "expand table, 12 heads",
    Attention(1, 12, 197, 197, kind="expand", grid=SQUARE),
)
END_TO_END = Problem("BEiT-B, table to output", replace(_BASE, kind="packed table", grid=SQUARE))
# In order of worth.
PROBLEMS = (
    BASE,
    BASE_SEPARATE,
    BASE_LAST,
    EXPAND,
    END_TO_END,
    Problem("BEiT-L, packed qkv", _LARGE),
    Problem(
        "BEiT-B at 384 pixels",
        Attention(32, 12, 577, 577, kind="packed", aligned=True),
        worth=2,
    ),
    Problem("BEiT-L, last block", replace(_LAST, batch=64, heads=16), worth=2),
    Problem("BEiT-B, packed qkv, fp16", _BASE, "float16", worth=2),
    Problem(
        "BEiT-B at 640 pixels",
        Attention(8, 12, 1601, 1601, kind="packed", aligned=True),
        worth=2,
    ),
)

FLASH2 = "SDPA flash (FlashAttention-2), no bias"
_FORWARD = "attention forward, 128 images"
_BACKWARD = "attention backward with dBias, 128 images"
_FLASH = "with a trained bias: faster than FlashAttention-2 without any"
TARGETS: tuple[Target, ...] = (
    AtMost(f"{_FORWARD}: at most 85 µs", BASE.name, "forward", 85.0),
    AtMost(f"{_FORWARD}: goal of 75 µs", BASE.name, "forward", 75.0),
    AtMost(f"{_BACKWARD}: at most 250 µs", BASE.name, "backward", 250.0),
    AtMost(f"{_BACKWARD}: goal of 200 µs", BASE.name, "backward", 200.0),
    AtMost(f"{_BACKWARD}: stretch of 150 µs", BASE.name, "backward", 150.0),
    Against(f"forward, {_FLASH}", BASE_SEPARATE.name, "forward", FLASH2),
    Against(f"backward, {_FLASH}", BASE_SEPARATE.name, "backward", FLASH2),
)
