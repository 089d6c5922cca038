"""The frozen tokenizer at the DALL-E encoder's size: 112x112 pixels to 14x14 tokens of 8192 codes.

    pytest benchmarks/test_tokenizer.py --benchmark-only

Random weights (a download would add nothing to a time). The reference computes logits at every
patch in NCHW memory, as the official code does; ours the masked patches' codes only, "fast" with
what `auto` takes, "kernels" with every kernel of ours, shown to be ahead or not. The share of
tokens that equal the fp32 reference's is asserted before anything is timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.steps import expected, tokenizers
from benchmarks.steps.problem import base_for, emulated
from benchmarks.suite import DEVICE, NO_KERNELS, WARM_UPS, measure, missing, name_row

EQUAL = {"float16": 0.95, "bfloat16": 0.8, "float32": 0.999}
"""Least share of equal tokens. In fp32 a code may be another where two scores tie to rounding; in
16 bits, of random weights' many near ties, the more the fewer bits there are."""
PATHS = {"reference": tokenizers.reference, "fast": tokenizers.ours, "kernels": tokenizers.kernels}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", EQUAL)
def test_tokenizer(benchmark: Any, path: str, name: str) -> None:
    """Codes of the masked patches of a batch."""
    problem, device = base_for(DEVICE), torch.device(DEVICE)
    about = {"suite": "tokenizer", "part": "encode", "path": path, "dtype": name}
    sizes: dict[str, Any] = {"image": problem.token_side[0], "batch": problem.batch}
    name_row(benchmark, about, sizes)
    dtype = getattr(torch, name)
    if (reason := emulated(DEVICE, dtype)) is not None:
        missing(reason)
    if path == "kernels" and DEVICE == "cpu":
        missing(NO_KERNELS)
    batch = problem.batch_on(device)
    tokenize = PATHS[path](problem, device, dtype)

    def check() -> None:
        truth = expected.targets(problem, DEVICE)
        share = tokenizers.equal_share(tokenize(batch), truth)
        benchmark.extra_info["equal_tokens"] = share
        assert share >= EQUAL[name], f"only {100 * share:.1f} % of the tokens are fp32's"

    measure(
        benchmark,
        lambda: tokenize(batch),
        **about,
        check=check,
        images=problem.batch,
        work=problem.tokenizer_work(dtype),
        rounds=4,
        warmup=WARM_UPS,
        **sizes,
    )
