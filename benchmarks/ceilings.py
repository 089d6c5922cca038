"""What this machine does at its best, measured once a session: products of a dtype, and copies.

The fraction of the limit that a suite's row states is against these, so a row says what the machine
gave on the day, not what a data sheet promises. Random data; matrices that grow until a product
takes long enough to time, copies larger than any last-level cache.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.roofline import Ceiling

LEAST_S = 0.04
"""A product is timed at the first side at which it takes this long, or at `LARGEST_SIDE`."""
LARGEST_SIDE = {"cpu": 4096, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30}
ROUNDS = 5


_measured: dict[str, dict[str, Any]] = {}


def ceiling(device: str, dtype: str) -> Ceiling:
    """Of ``device`` ("cpu" or "cuda") for products of a floating ``dtype``, by its torch name."""
    if dtype not in _measured:
        tflops, side = product_tflops(device, dtype)
        copied = COPIED_BYTES[device] // 2**20
        told = f"measured: {dtype} product of side {side}, copy of {copied} MiB"
        _measured[dtype] = asdict(Ceiling(tflops, copy_tb_per_s(device), told))
    return Ceiling(**_measured[dtype])


def measured() -> dict[str, dict[str, Any]]:
    """The ceilings of this session so far, by dtype."""
    return dict(_measured)


@functools.cache
def product_tflops(device: str, dtype: str) -> tuple[float, int]:
    """TFLOP/s, and the side of the matrices."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype of torch, such as 'float32', got {dtype}")
    side = 256
    while True:
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        product = functools.partial(torch.mm, a, b)
        taken_s = least_s(product, device, rounds=1)
        if taken_s >= LEAST_S or side >= LARGEST_SIDE[device]:
            break
        side *= 2
    # Where one product takes seconds (emulated bf16), once is enough.
    taken_s = taken_s if taken_s > 1 else least_s(product, device, ROUNDS)
    return 2 * side**3 / taken_s / 1e12, side


@functools.cache
def copy_tb_per_s(device: str) -> float:
    """TB/s read and written together."""
    source = torch.randn(COPIED_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES[device] / least_s(lambda: target.copy_(source), device, ROUNDS) / 1e12


def least_s(call: Callable[[], object], device: str, rounds: int) -> float:
    """Seconds of the quickest of ``rounds`` calls, after one that is not timed."""
    taken = []
    for number in range(rounds + 1):
        began_s = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if number:
            taken.append(time.perf_counter() - began_s)
    return min(taken)
