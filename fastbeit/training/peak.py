"""Stated peak arithmetic of GPUs: what a model-FLOPs utilisation is a share of.

Dense figures (sheets print twice as much, with sparsity) for 16-bit products summed in fp32, and
for plain fp32 without TF32. A device that is not listed has no MFU: a wrong peak is worse than
none. So names must match whole: a MIG slice or a laptop version is not its big brother.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import torch

DATA_SHEET = "NVIDIA data sheet"
WHITE_PAPER = "NVIDIA architecture white paper"


class Gpu(NamedTuple):
    """One product: what its device name looks like, and its peaks in TFLOP/s (None: not stated)."""

    pattern: str
    label: str
    bf16: float | None
    fp32: float | None
    source: str


GPUS = (
    Gpu(r"GB200", "GB200", 2500, None, DATA_SHEET),
    Gpu(r"B200", "B200", 2250, None, DATA_SHEET),
    Gpu(r"H200", "H200 SXM", 989, 67, DATA_SHEET),
    Gpu(r"H200 NVL", "H200 NVL", 835, 60, DATA_SHEET),
    Gpu(r"GH200 (480GB|144G HBM3e)", "GH200", 989, 67, DATA_SHEET),
    Gpu(r"H100 80GB HBM3|H100 SXM5.*", "H100 SXM", 989, 67, DATA_SHEET),
    Gpu(r"H100 NVL", "H100 NVL", 835, 60, DATA_SHEET),
    Gpu(r"H100 PCIe", "H100 PCIe", 756, 51, DATA_SHEET),
    Gpu(r"A100-(SXM4?|PCIE)-[48]0GB|A100 80GB PCIe", "A100", 312, 19.5, DATA_SHEET),
    Gpu(r"A40", "A40", 149.7, 37.4, DATA_SHEET),
    Gpu(r"A30", "A30", 165, 10.3, DATA_SHEET),
    Gpu(r"A10", "A10", 125, 31.2, DATA_SHEET),
    Gpu(r"L40S", "L40S", 362, 91.6, DATA_SHEET),
    Gpu(r"L40", "L40", 181, 90.5, DATA_SHEET),
    Gpu(r"L4", "L4", 121, 30.3, DATA_SHEET),
    Gpu(r"GeForce RTX 3090", "RTX 3090", 71, 35.6, WHITE_PAPER),
    Gpu(r"GeForce RTX 4090", "RTX 4090", 165.2, 82.6, WHITE_PAPER),
    Gpu(r"GeForce RTX 5090", "RTX 5090", 209.5, 104.8, WHITE_PAPER),
    # No bf16 in their tensor cores.
    Gpu(r"V100-SXM2-(16|32)GB", "V100 SXM2", None, 15.7, DATA_SHEET),
    Gpu(r"T4", "T4", None, 8.1, DATA_SHEET),
)


class PeakFlops(NamedTuple):
    """A device's stated peak."""

    flops_per_s: float | None
    source: str
    """Peak, product, precision and who states it; or why there is none."""


def peak_flops(device: torch.device | str, precision: Literal["bf16", "fp32"]) -> PeakFlops:
    """The stated dense peak of a device in a precision.

    Args:
        device: a device of this machine ("cuda", "cuda:1", "cpu"), or a GPU's name as CUDA gives it
            ("NVIDIA H100 80GB HBM3").
    """
    if isinstance(device, torch.device) or re.fullmatch(r"(cpu|mps|cuda|xpu)(:\d+)?", device):
        device = torch.device(device)
        if device.type != "cuda":
            return PeakFlops(None, f"no peak is stated for {device.type.upper()} devices")
        device = torch.cuda.get_device_name(device)
    name = re.sub(r"^(NVIDIA |Tesla )+", "", device.strip())
    for gpu in GPUS:
        if re.fullmatch(gpu.pattern, name):
            tflops = gpu.bf16 if precision == "bf16" else gpu.fp32
            if tflops is None:
                return PeakFlops(None, f"no {precision} peak is on record for {gpu.label}")
            return PeakFlops(
                tflops * 1e12, f"{tflops:g} TFLOP/s, {gpu.label} {precision} dense ({gpu.source})"
            )
    return PeakFlops(None, f"no peak is on record for {device!r}")
