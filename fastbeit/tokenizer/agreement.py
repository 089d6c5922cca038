"""How many of a tokenizer's tokens survive 16 bits: bf16 and fp16 against fp32, on images.

    python -m fastbeit.tokenizer.agreement --tokenizer demo --data DIR
    python -m fastbeit.tokenizer.agreement --tokenizer dall-e --data DIR --device cuda --impl triton

Views are pre-training's: random crops and jitter, as ``fastbeit.pretrain`` draws them. For each
precision: the share of tokens that equal those of fp32, and for the others the fp32 logit margin,
by how much fp32 prefers its own token to the one chosen in 16 bits. A margin far below the typical
gap between the best two codes (also printed) is a near tie; a large one means numbers that don't
fit the format. fp32 here is fp32: TF32 is switched off for it.

``--arithmetic rounded`` computes in fp32 and rounds weights and every result to 16 bits, as tensor
cores do, on whatever device; ``device`` uses the device's own 16-bit arithmetic, and on a CPU
without any that is slow and sums as it likes.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbeit.data import BatchSchedule, MaskSpec, PlanSpec, make_loader, open_source
from fastbeit.data.views import ViewSpec
from fastbeit.tokenizer.dvae import Block, Conv, Encoder
from fastbeit.tokenizer.files import load_tokenizer
from fastbeit.tokenizer.tokenizer import Tokenizer
from fastbeit_kernels import Impl, linear_argmax

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
Arithmetic = Literal["device", "rounded"]


@dataclass(frozen=True)
class Agreement:
    """Of one precision with fp32. Margins and gaps are differences of fp32 logits, in nats.

    Attributes:
        tokens, equal: how many there are, and how many are the same.
        margin_median, margin_max: where they differ, fp32's best logit minus that of the code
            chosen in 16 bits; 0 where none differ.
        gap_median: fp32's best logit minus its second, over all tokens.
        not_finite: images with a feature that is infinite or NaN in 16 bits.
    """

    precision: str
    tokens: int
    equal: int
    margin_median: float
    margin_max: float
    gap_median: float
    not_finite: int

    @property
    def share(self) -> float:
        return self.equal / self.tokens

    def __str__(self) -> str:
        where = "no token differs"
        if self.equal < self.tokens:
            where = (
                f"where they differ, the fp32 margin is {self.margin_median:.3g} nats in the "
                f"median, {self.margin_max:.3g} at most"
            )
        text = (
            f"{self.precision}: {100 * self.share:.2f} % of {self.tokens:,} tokens equal; {where} "
            f"(gap between fp32's best two codes: {self.gap_median:.3g} in the median)"
        )
        return text + f"; {self.not_finite} IMAGES NOT FINITE" * bool(self.not_finite)


def compare(
    tokenizer: Tokenizer,
    batches: Iterable[Tensor],
    precisions: Iterable[str] = ("bf16", "fp16"),
    *,
    arithmetic: Arithmetic = "device",
) -> list[Agreement]:
    """Agreement of each precision, over batches [B, C, H, W] of mapped pixels.

    ``tokenizer`` is the fp32 one; 16-bit ones run on its implementation.
    """
    if tokenizer.encoder.head.w.dtype != torch.float32:
        raise ValueError(
            f"the tokenizer to compare with must be float32, got {tokenizer.encoder.head.w.dtype}"
        )
    names = list(precisions)
    others = {name: _in_16_bits(tokenizer, PRECISIONS[name], arithmetic) for name in names}
    equal, margins, gaps = dict.fromkeys(names, 0), {name: [] for name in names}, []
    not_finite = dict.fromkeys(names, 0)
    for images in batches:
        exact_RV = _exact_logits(tokenizer, images)
        best = exact_RV.topk(2).values
        gaps.append(best[:, 0] - best[:, 1])
        tokens = exact_RV.argmax(1)
        for name, other in others.items():
            rows_BND = _rows(other, images, PRECISIONS[name], arithmetic)
            not_finite[name] += int((~rows_BND.isfinite()).flatten(1).any(1).sum())
            head = other.encoder.head
            chosen = linear_argmax(
                rows_BND.flatten(0, 1), head.w[:, :, 0, 0], head.b, impl=other.impl
            )
            differ = chosen != tokens
            equal[name] += int((~differ).sum())
            lost = best[:, 0] - exact_RV.gather(1, chosen[:, None])[:, 0]
            margins[name].append(lost[differ])
    if not gaps:
        raise ValueError("there are no images to compare on")
    gap = torch.cat(gaps)
    return [
        Agreement(
            name,
            tokens=gap.numel(),
            equal=equal[name],
            margin_median=_median(torch.cat(margins[name])),
            margin_max=max(torch.cat(margins[name]).tolist(), default=0.0),
            gap_median=_median(gap),
            not_finite=not_finite[name],
        )
        for name in names
    ]


def _median(values: Tensor) -> float:
    return float(values.median()) if values.numel() else 0.0


def _exact_logits(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """fp32 [B * h * w, V], by PyTorch, without TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits_BVhw = tokenizer.logits(images)
    return logits_BVhw.permute(0, 2, 3, 1).flatten(0, 2)


def _in_16_bits(tokenizer: Tokenizer, dtype: torch.dtype, arithmetic: Arithmetic) -> Tokenizer:
    other = copy.deepcopy(tokenizer).to(dtype)
    return other.float() if arithmetic == "rounded" else other


def _rows(other: Tokenizer, images: Tensor, dtype: torch.dtype, arithmetic: Arithmetic) -> Tensor:
    """What the head reads, [B, h * w, D]."""
    if arithmetic == "device":
        return other.features(images).permute(0, 2, 3, 1).flatten(1, 2)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        features = rounded_features(other.encoder, images.float(), dtype)
    return features.permute(0, 2, 3, 1).flatten(1, 2)


def rounded_features(encoder: Encoder, images_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """``encoder.features`` in fp32, each result rounded to ``dtype``; weights are rounded already.

    What tensor cores do, which sum in fp32: one rounding for each convolution and each sum.
    """

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    def conv(conv: Conv, x: Tensor) -> Tensor:
        return rounded(F.conv2d(x, conv.w, conv.b, padding=conv.w.shape[-1] // 2))

    x = conv(cast(Conv, encoder.blocks["input"]), rounded(images_BCHW))
    for number in range(1, len(encoder.config.widths) + 1):
        if number > 1:
            x = F.max_pool2d(x, 2)
        for block in cast(nn.ModuleDict, encoder.blocks[f"group_{number}"]).values():
            block = cast(Block, block)
            branch = x
            for part in block.res_path.values():
                branch = conv(cast(Conv, part), branch.relu())
            skip = x if block.id_path is None else conv(block.id_path, x)
            x = rounded(torch.add(skip, branch, alpha=block.gain))
    return x.relu()


def views_of(
    tokenizer: Tokenizer, data: str, *, tokens: int, images: int, batch: int, seed: int
) -> Iterator[Tensor]:
    """``images`` of pre-training's token views, ``tokens`` a side, on the tokenizer's device."""
    source = open_source(data)
    batch = min(batch, images, len(source))
    side = tokens * tokenizer.stride
    views = ViewSpec(
        size=(tokenizer.stride, tokenizer.stride),  # the student's are not looked at
        token_size=(side, side),
        token_resample=tokenizer.resample,
        channels=tokenizer.channels,
        token_scale=tokenizer.pixel_scale,
        token_offset=tokenizer.pixel_offset,
    )
    loader = make_loader(
        source,
        PlanSpec(mask=MaskSpec(grid=(1, 1), target=1, strategy="none")),
        views,
        BatchSchedule(len(source), batch, seed),
        seed=seed,
        total_steps=-(-images // batch),
        device=tokenizer.encoder.head.w.device,
    )
    with loader:
        for part in loader:
            yield part.token_images


def main(arguments: list[str] | None = None) -> int:
    """Command line. Exit code 0, or 2 with a message that names the cause."""
    program = "python -m fastbeit.tokenizer.agreement"
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="dall-e, demo, or a file")
    parser.add_argument("--data", required=True, help="images, as fastbeit.pretrain takes them")
    parser.add_argument("--images", type=int, default=1024, help="views; default 1024")
    parser.add_argument("--tokens", type=int, default=14, help="tokens a side; default 14")
    parser.add_argument("--batch", type=int, default=32, help="views at once; default 32")
    parser.add_argument("--seed", type=int, default=0, help="of crops and jitter; default 0")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...; default cpu")
    parser.add_argument("--impl", default="auto", choices=("auto", "triton", "reference"))
    parser.add_argument("--arithmetic", default="device", choices=("device", "rounded"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    options = parser.parse_args(arguments)
    try:
        for name in ("images", "tokens", "batch"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
        impl = cast(Impl, options.impl)
        tokenizer = load_tokenizer(options.tokenizer, device=options.device, impl=impl)
        batches = views_of(
            tokenizer,
            options.data,
            tokens=options.tokens,
            images=options.images,
            batch=options.batch,
            seed=options.seed,
        )
        found = compare(tokenizer, batches, arithmetic=options.arithmetic)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    about = tokenizer.describe()
    print(
        f"{options.tokenizer} (sha256 {about.get('sha256', '?')[:12]}), {options.data}, "
        f"{options.device}, {options.arithmetic} arithmetic, {about['kernels']['runs']}, "
        f"PyTorch {torch.__version__}"
    )
    for agreement in found:
        print(agreement)
    if options.json:
        record = {
            "describe": about,
            "torch": torch.__version__,
            **{k: v for k, v in vars(options).items() if k != "json"},
            "agreement": [{**asdict(a), "share": a.share} for a in found],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
