"""The tokenizer of a run, in the precision that the run asks for or that its images bear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastbeit import environment
from fastbeit.data import BatchSchedule, make_loader
from fastbeit.tokenizer import Tokenizer, load_tokenizer
from fastbeit.tokenizer.agreement import Agreement, compare
from fastbeit.training import setup
from fastbeit.training.checkpoint import Saved
from fastbeit.training.config import PretrainConfig
from fastbeit.training.distributed import World

BORNE_SHARE = 0.99
"""Tokens that must equal fp32's for ``--tokenizer-precision auto`` to take 16 bits. Others are near
ties: on the demo's tokenizer fp16 keeps 99.5 %, bf16 97.3 % (docs/tokenizers.md)."""

TRIED_IMAGES, TRIED_AT_ONCE = 64, 32
"""12,544 tokens at 14 x 14: a share of 99 % is known to 0.1 points."""


def load_run_tokenizer(
    config: PretrainConfig, source: Any, world: World, saved: Saved | None
) -> tuple[Tokenizer, PretrainConfig, list[str]]:
    """The tokenizer on the device, ``config`` with its precision settled, and why.

    ``auto`` compares 16-bit tokens with fp32's on the run's first images, on rank 0, wherever the
    device multiplies 16 bits faster. A resumed run keeps what it began with.
    """
    asked = config.tokenizer.tokenizer_precision
    tokenizer = load_tokenizer(
        config.tokenizer.tokenizer, device=world.device, impl=config.run.kernels
    )
    begun = _begun_with(saved, tokenizer) if asked == "auto" else None
    settled = begun or asked
    notes = [f"tokenizer precision: {settled} (asked for by name)"] if asked != "auto" else []
    if settled == "auto":
        told: list[Any] = [None, None]
        if world.is_main:
            told = list(choose_precision(tokenizer, config, source, world.device))
        dist.broadcast_object_list(told, src=0, group=world.control)
        settled, reason = told
        notes.append(f"tokenizer precision: {settled} ({reason})")
    elif begun is not None:
        notes.append(f"tokenizer precision: {settled} (as the run began)")
    tokenizer = tokenizer.to(setup.DTYPES[settled])
    tokenizer.origin["precision"] = settled
    chosen = replace(config.tokenizer, tokenizer_precision=settled)
    return tokenizer, replace(config, tokenizer=chosen), notes


def _begun_with(saved: Saved | None, tokenizer: Tokenizer) -> str | None:
    """The precision of a run that goes on with the same tokenizer; None where it is open."""
    if saved is None:
        return None
    before = saved.state["tokenizer"]
    if before.get("sha256") != tokenizer.describe().get("sha256"):
        return None
    asked = saved.state["config"]["tokenizer"]["tokenizer_precision"]
    return before.get("precision") or (asked if asked != "auto" else None)


def fast_precisions(device: torch.device) -> list[str]:
    """16-bit formats that a device multiplies faster than fp32."""
    if device.type == "cuda":
        return ["fp16", "bf16"] if torch.cuda.get_device_capability(device) >= (8, 0) else ["fp16"]
    return ["bf16"] if environment.cpu_bf16() is not None else []


def choose_precision(
    tokenizer: Tokenizer, config: PretrainConfig, source: Any, device: torch.device
) -> tuple[str, str]:
    """fp32, or the 16-bit format that keeps most of fp32's tokens, and why."""
    names = fast_precisions(device)
    if not names:
        return "fp32", "this device has no fast 16-bit products"
    try:
        return best_of(compare(tokenizer, _views(tokenizer, config, source, device), names))
    except torch.OutOfMemoryError:
        return "fp32", "the device's memory is too small to compare"


def best_of(found: Sequence[Agreement]) -> tuple[str, str]:
    """The choice among measured agreements with fp32, and the sentence that says so."""
    shares = ", ".join(
        f"{a.precision} {'not finite' if a.not_finite else f'{100 * a.share:.2f} %'}" for a in found
    )
    told = f"of {found[0].tokens:,} tokens equal to fp32's: {shares}"
    borne = [a for a in found if not a.not_finite and a.share >= BORNE_SHARE]
    if not borne:
        return "fp32", f"{told}; {100 * BORNE_SHARE:.0f} % are asked for"
    return max(borne, key=lambda a: a.share).precision, told


def _views(
    tokenizer: Tokenizer, config: PretrainConfig, source: Any, device: torch.device
) -> Iterator[Tensor]:
    """The token views of the run's first images."""
    at_once = min(TRIED_AT_ONCE, len(source))
    with make_loader(
        source,
        config.plan_spec(),
        setup.view_spec(config, tokenizer),
        BatchSchedule(len(source), at_once, config.run.seed),
        seed=config.run.seed,
        total_steps=-(-min(TRIED_IMAGES, len(source)) // at_once),
        backend="reference",
        workers=0,
        device=device,
        max_bad_fraction=1.0,  # the run itself judges its data
        max_pixels=config.data.max_pixels,
    ) as loader:
        for batch in loader:
            yield batch.token_images
