"""Rows of the compile report, and how they are written: text, JSON, Markdown."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from .._launches import Record
from .compiled import Compiled
from .rules import breaches
from .targets import TARGETS, Target


@dataclass(frozen=True)
class Row:
    """One launch on one target.

    ``limit_us``: the formulas' FLOPs at the GPU's peak or every tensor once through memory,
    whichever takes longer. ``tiled_us``: the same with what the tiles compute, padding included,
    and with L2's traffic where its rate is known. Both are floors, not forecasts.
    """

    target: Target
    record: Record
    compiled: Compiled
    fallback: str | None

    @property
    def breaches(self) -> list[str]:
        found = breaches(self.compiled, self.target)
        return [] if self.fallback else found

    @property
    def flops_us(self) -> float:
        return self._arithmetic_us(self.record.flops)

    @property
    def memory_us(self) -> float:
        return self.record.hbm_bytes / self.target.rates.memory_tb_per_s / 1e6

    @property
    def l2_us(self) -> float | None:
        rate = self.target.rates.l2_tb_per_s
        return None if rate is None else self.record.l2_bytes / rate / 1e6

    @property
    def limit_us(self) -> float:
        return max(self.flops_us, self.memory_us)

    @property
    def tiled_us(self) -> float:
        padded = self._arithmetic_us(max(self.record.padded_flops, self.record.flops))
        return max(padded, self.memory_us, self.l2_us or 0.0)

    @property
    def rounds(self) -> float:
        """Turns that the GPU needs for all blocks; infinite if none fits."""
        at_once = self.compiled.blocks_per_sm * self.target.rates.multiprocessors
        return self.record.launch.grid / at_once if at_once else math.inf

    def _arithmetic_us(self, flops: int) -> float:
        rates = self.target.rates
        peak = rates.float_tflops if self.record.dtype == "float32" else rates.half_tflops
        return flops / peak / 1e6

    def as_dict(self) -> dict[str, Any]:
        record = self.record
        return {
            "arch": self.target.arch,
            "kernel": record.launch.kernel.__name__,
            "name": record.name,
            "dtype": record.dtype,
            "blocks": record.launch.grid,
            "stages": record.launch.stages,
            "maxnreg": record.launch.maxnreg,
            "constants": record.launch.constants,
            **dataclasses.asdict(self.compiled),
            "occupancy": self.compiled.blocks_per_sm
            * self.compiled.warps
            / self.target.warps_per_sm,
            "rounds": self.rounds if math.isfinite(self.rounds) else None,
            "flops": record.flops,
            "padded_flops": record.padded_flops,
            "hbm_bytes": record.hbm_bytes,
            "l2_bytes": record.l2_bytes,
            "flops_us": self.flops_us,
            "memory_us": self.memory_us,
            "l2_us": self.l2_us,
            "limit_us": self.limit_us,
            "tiled_us": self.tiled_us,
            "fallback": self.fallback,
            "breaches": self.breaches,
        }


COLUMNS = (
    "launch", "regs", "stack", "spills", "shared KB", "warps", "blocks/SM", "rounds", "barriers",
    "tensor cores", "q/k/v bytes", "GFLOP", "padded", "HBM MB", "L2 MB", "limit µs", "tiled µs",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    compiled, record = row.compiled, row.record
    return [
        record.name,
        str(compiled.registers),
        str(compiled.stack_bytes),
        str(compiled.local_instructions),
        f"{compiled.shared_bytes / 1024:.1f}",
        str(compiled.warps),
        str(compiled.blocks_per_sm),
        f"{row.rounds:.1f}",
        str(compiled.barriers),
        compiled.tensor_instructions,
        load_widths(compiled),
        f"{record.flops / 1e9:.1f}",
        f"{record.padded_flops / 1e9:.1f}",
        f"{record.hbm_bytes / 1e6:.0f}",
        f"{record.l2_bytes / 1e6:.0f}",
        f"{row.limit_us:.0f}" if row.limit_us >= 10 else f"{row.limit_us:.1f}",
        f"{row.tiled_us:.0f}" if row.tiled_us >= 10 else f"{row.tiled_us:.1f}",
    ]


def load_widths(compiled: Compiled) -> str:
    """``16`` or, with a last tile of keys too small for all threads, ``16 (8)``."""
    sizes = sorted(
        {
            size
            for name in ("q_ptr", "k_ptr", "v_ptr")
            if name in compiled.loads
            for size in compiled.loads[name].sizes
        },
        reverse=True,
    )
    if not sizes:
        return "–"
    return str(sizes[0]) + "".join(f" ({size})" for size in sizes[1:])


def text_table(rows: list[Row]) -> str:
    """For a terminal: one block a target and dtype, and the breaches below."""
    lines = []
    for title, group in groups(rows):
        table = [list(COLUMNS), *(cells(row) for row in group)]
        widths = [max(len(line[place]) for line in table) for place in range(len(COLUMNS))]
        lines.append(title)
        for line in table:
            padded = [
                cell.ljust(width) if place == 0 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            lines.append("  ".join(padded))
        lines.append("")
    return "\n".join([*lines, *sentences(rows)])


def sentences(rows: list[Row]) -> list[str]:
    found = []
    for row in rows:
        label = f"{row.target.arch} {row.record.dtype} {row.record.name}"
        found += [f"{label}: {breach}" for breach in row.breaches]
        if row.fallback:
            found.append(f"{label}: does not fit, {row.fallback}")
    return found


def groups(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row.target.arch} ({row.target.rates.gpu}), {row.record.dtype}"
        found.setdefault(title, []).append(row)
    return list(found.items())


def to_json(rows: list[Row], triton: str) -> str:
    data = {"triton": triton, "note": "compiled, not measured", "rows": [r.as_dict() for r in rows]}
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def markdown(rows: list[Row], triton: str, command: str) -> str:
    lines = [
        "# What the kernels compile to",
        "",
        "Compiled, not measured: registers, memory and instructions are read from the code that "
        f"Triton {triton} makes for each GPU, and times are floors computed from counted work and "
        "the rates below. No kernel ran.",
        "",
        f"Made by `{command}`.",
        "",
        "- **limit**: the formulas' FLOPs at peak or each tensor once through memory, the longer.",
        "- **tiled**: the same with the padding that tiles compute, and L2's traffic where its "
        "rate is known.",
        "- **stack, spills**: bytes, and loads and stores of local memory. **rounds**: blocks over "
        "what the GPU holds at once. **tensor cores**: instructions in the code, of a warp (mma), "
        "four warps (wgmma) or a block (tcgen05). **q/k/v bytes**: that a thread loads at once; in "
        "brackets those of a last tile too small for all threads.",
        "",
        "| | GPU | 16-bit TFLOP/s | fp32 TFLOP/s | memory TB/s | L2 TB/s | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS.values():
        if any(row.target == target for row in rows):
            r = target.rates
            l2 = "–" if r.l2_tb_per_s is None else f"{r.l2_tb_per_s:g}"
            lines.append(
                f"| {target.arch} | {r.gpu} | {r.half_tflops:g} | {r.float_tflops:g} "
                f"| {r.memory_tb_per_s:g} | {l2} | {r.source} |"
            )
    for title, group in groups(rows):
        lines += ["", f"## {title}", "", "| " + " | ".join(COLUMNS) + " |"]
        lines.append("|---" + "|---:" * (len(COLUMNS) - 1) + "|")
        lines += ["| " + " | ".join(cells(row)) + " |" for row in group]
    found = sentences(rows) or ["Nothing: no spills, no tile computed twice, all loads wide."]
    return "\n".join([*lines, "", "## What breaks a rule", "", *(f"- {one}" for one in found), ""])
