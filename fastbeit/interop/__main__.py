"""Convert a BEiT checkpoint between layouts, and prove that the copy computes the same.

    python -m fastbeit.interop SRC DST --to hf|timm|official

SRC is safetensors, .pth/.bin, or a transformers directory; DST a file, or for hf a directory too.
Nothing in SRC is executed. Exit code 0: written and proved; 1: the copy computes something else;
2: SRC is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from fastbeit.interop.configs import build_model_for
from fastbeit.interop.files import WeightsError
from fastbeit.interop.layouts import LAYOUTS
from fastbeit.interop.saving import save_weights
from fastbeit.interop.weights import LoadReport, Model, load_weights
from fastbeit.model import BeitClassifier, BeitForMim

# The copy holds the same numbers; only the order of an addition could differ.
TOLERANCE = 1e-6


def convert(src: Path, dst: Path, to: str, *, heads: int | None = None) -> int:
    """Convert, report to standard output, return the exit code."""
    model = build_model_for(src, heads=heads).eval()
    report = load_weights(model, src)
    print(report)
    saved = save_weights(model, dst, to, omit=report.missing)  # pyright: ignore[reportArgumentType]
    print(f"{saved.path} ({saved.layout}): {len(saved.written)} names written")
    print(
        f"  dropped: {len(saved.dropped)}"
        + (f" ({', '.join(saved.dropped)})" if saved.dropped else "")
    )
    copy = _empty_copy(model, to)
    back = load_weights(copy, saved.path)
    worst = 0.0
    for name, (ours, theirs) in _outputs(model, copy, report, back).items():
        difference = ((ours - theirs).norm() / ours.norm().clamp(min=1e-30)).item()
        worst = max(worst, difference)
        print(f"  {name} {list(ours.shape)} read back: relative difference {difference:.1e}")
    if not worst <= TOLERANCE:
        print(f"the copy computes something else (more than {TOLERANCE:.0e} off): don't use it")
        return 1
    return 0


def _empty_copy(model: Model, to: str) -> Model:
    config = model.config
    if to == "timm" and config.position == "relative":
        config = dataclasses.replace(config, position="relative_per_block")
    kind = BeitForMim if isinstance(model, BeitForMim) else BeitClassifier
    return kind(config, seed=1).eval()


@torch.no_grad()
def _outputs(
    model: Model, copy: Model, report: LoadReport, back: LoadReport
) -> dict[str, tuple[Tensor, Tensor]]:
    """What both compute on the same noise, as far as the weights were there to begin with."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.in_channels, *config.image_hw, generator=generator)
    outputs = {"features": (model.features(images), copy.features(images))}
    absent = {name.split(".")[0] for name in (*report.missing, *back.missing)}
    if isinstance(model, BeitClassifier) and isinstance(copy, BeitClassifier):
        if not absent & {"head", "fc_norm"}:
            outputs["logits"] = (model(images), copy(images))
    elif isinstance(model, BeitForMim) and isinstance(copy, BeitForMim):
        if not absent & {"lm_head", "mask_token"}:
            positions = torch.arange(0, config.patches, 2, dtype=torch.int32).repeat(2, 1)
            outputs["masked logits"] = (model(images, positions), copy(images, positions))
    return outputs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastbeit.interop",
        description="Convert a BEiT checkpoint between layouts and prove the copy.",
    )
    parser.add_argument(
        "src", type=Path, help="safetensors, .pth, .bin, or a transformers directory"
    )
    parser.add_argument("dst", type=Path, help="file to write; for hf a directory too")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout of the copy")
    parser.add_argument(
        "--heads",
        type=int,
        help="attention heads, where the file leaves them open (default width/64)",
    )
    arguments = parser.parse_args(argv)
    try:
        return convert(arguments.src, arguments.dst, arguments.to, heads=arguments.heads)
    except WeightsError as error:
        print(error, file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
