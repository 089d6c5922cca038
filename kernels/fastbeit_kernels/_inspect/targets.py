"""Limits and rates of the GPUs that the compile report is for.

Limits per compute capability: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability". Registers are given to warps 256 at a time, and shared memory to blocks 128
bytes at a time on top of 1 KB that CUDA keeps for each block.

Rates are those of one product each; ``source`` says whether they are measured, printed in a data
sheet or estimated. Dense figures, products summed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
REGISTERS_PER_SM = 65536
REGISTERS_PER_THREAD = 255
WARP = 32
SHARED_RESERVED_BYTES = KIB
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Rates:
    """How fast one product computes and moves data; None: not published."""

    gpu: str
    multiprocessors: int
    half_tflops: float
    float_tflops: float
    memory_tb_per_s: float
    l2_tb_per_s: float | None
    source: str


@dataclass(frozen=True)
class Target:
    """A compute capability and the product that stands for it."""

    arch: str
    family: str
    warps_per_sm: int
    blocks_per_sm: int
    shared_per_sm: int
    shared_per_block: int
    rates: Rates

    @property
    def capability(self) -> int:
        return int(self.arch.removeprefix("sm_"))

    def blocks_at_once(self, registers: int, shared: int, warps: int, columns: int = 0) -> int:
        """Blocks that one multiprocessor holds together; 0 if not even one fits.

        Args:
            registers: of a thread.
            shared: bytes of shared memory of a block, without what CUDA keeps.
            columns: of tensor memory (compute capability 10).
        """
        registers_per_warp = -(-registers * WARP // 256) * 256
        # A quarter of the registers belongs to each of the four schedulers.
        warps_by_registers = REGISTERS_PER_SM // 4 // registers_per_warp * 4
        shared_taken = -(-(shared + SHARED_RESERVED_BYTES) // 128) * 128
        limits = [
            self.blocks_per_sm,
            self.warps_per_sm // warps,
            warps_by_registers // warps,
            self.shared_per_sm // shared_taken,
        ]
        if columns:
            limits.append(TENSOR_MEMORY_COLUMNS // columns)
        return min(limits)


A100 = Rates(
    "A100 SXM 80 GB", 108, 312, 19.5, 2.039, 7.2,
    "data sheet; L2: 5,120 bytes a clock (NVIDIA A100 white paper) at 1.41 GHz",
)  # fmt: skip
RTX_3090 = Rates("RTX 3090", 82, 71, 35.6, 0.936, None, "NVIDIA GA102 white paper")
RTX_4090 = Rates("RTX 4090", 128, 165.2, 82.6, 1.008, None, "NVIDIA Ada white paper")
H100 = Rates(
    "H100 SXM", 132, 798, 67, 3.0, 5.5,
    "products and memory as measured by others, fp32 from the data sheet, L2 estimated",
)  # fmt: skip
B200 = Rates(
    "B200", 148, 2250, 75, 8.0, None,
    "an eighth of the HGX and DGX B200 data sheets; L2 is not published",
)  # fmt: skip
RTX_5090 = Rates("RTX 5090", 170, 209.5, 104.8, 1.792, None, "NVIDIA RTX Blackwell white paper")

TARGETS = {
    target.arch: target
    for target in (
        Target("sm_80", "sm_80", 64, 32, 164 * KIB, 163 * KIB, A100),
        Target("sm_86", "sm_86", 48, 16, 100 * KIB, 99 * KIB, RTX_3090),
        Target("sm_89", "sm_86", 48, 24, 100 * KIB, 99 * KIB, RTX_4090),
        Target("sm_90", "sm_90", 64, 32, 228 * KIB, 227 * KIB, H100),
        Target("sm_100", "sm_100", 64, 32, 228 * KIB, 227 * KIB, B200),
        Target("sm_120", "sm_86", 48, 24, 100 * KIB, 99 * KIB, RTX_5090),
    )
}


def target_of(arch: str) -> Target:
    """``"sm_90"`` → its limits; ValueError for one that isn't listed."""
    if arch not in TARGETS:
        raise ValueError(f"arch must be one of {', '.join(TARGETS)}, got {arch!r}")
    return TARGETS[arch]
