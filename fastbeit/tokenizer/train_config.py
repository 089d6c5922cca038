"""The configuration of tokenizer training: one frozen dataclass, shown by ``--help``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from fastbeit.tokenizer.dvae import DvaeConfig


@dataclass(frozen=True)
class TrainConfig:
    """Train a discrete VAE on your own images and write it as a tokenizer file.

    Encoder and decoder are of DALL-E's block family (arXiv 2102.12092); the relaxation is
    Gumbel-softmax. The same command on the same machine with the same number of threads gives the
    same file (on a CPU; a GPU's convolutions may differ in the last bits).
    """

    data: Annotated[str, arg(metavar="PATH")]
    """Images: a folder (searched recursively), a list file, tar shards, or "demo"."""
    out: Annotated[Path, arg(metavar="FILE.safetensors")]
    """The tokenizer file to write; OUT.jsonl beside it takes the metrics."""
    validation_data: Annotated[str | None, arg(metavar="PATH")] = None
    """Images for the reconstruction error; none: every 20th image of --data is held out (with
    "demo": its validation split)."""

    image_px: Annotated[int, arg(metavar="PX")] = 112
    """Side of the square training views; a multiple of the stride, 2^(groups - 1)."""
    channels: Literal[1, 3] = 3
    """Colours the tokenizer reads; must be the student's."""
    codes: Annotated[int, arg(metavar="COUNT")] = 8192
    """Size of the codebook, at most 8192."""
    widths: Annotated[tuple[int, ...], arg(metavar="WIDTH ...")] = (64, 128, 256, 512)
    """Channels of the encoder's groups. Each group after the first doubles the pixels a token
    covers: four groups make 8 pixels a token, three make 4. The decoder mirrors them."""
    blocks_per_group: Annotated[int, arg(metavar="COUNT")] = 2
    """Residual blocks a group."""
    kernel: Annotated[int, arg(metavar="PX")] = 7
    """Side of the first convolution, odd."""
    code_width: Annotated[int, arg(metavar="WIDTH")] = 128
    """Channels of the decoder's code embeddings."""
    likelihood: Literal["mse", "logit-laplace"] = "mse"
    """mse: (x - mu)^2 / (2 * 0.1^2); logit-laplace: as published, mean and scale a sub-pixel."""

    crop_scale: Annotated[tuple[float, float], arg(metavar="MIN_SHARE MAX_SHARE")] = (0.2, 1.0)
    """Area of the random crop, as a share of the image's."""
    crop_ratio: Annotated[tuple[float, float], arg(metavar="MIN_RATIO MAX_RATIO")] = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
    flip: Annotated[float, arg(metavar="PROBABILITY")] = 0.5
    """Probability of a horizontal flip."""
    jitter: Annotated[tuple[float, float, float], arg(metavar="BRIGHTNESS CONTRAST SATURATION")] = (
        0.0,
        0.0,
        0.0,
    )
    """Strength of colour jitter; give the student's, so that the tokens stay good under it."""

    steps: Annotated[int, arg(metavar="STEPS")] = 50_000
    """Optimizer steps."""
    batch: Annotated[int, arg(metavar="IMAGES")] = 64
    """Images a step."""
    lr: Annotated[float, arg(metavar="RATE")] = 1e-3
    """Peak learning rate of AdamW; cosine to lr_final."""
    lr_final: Annotated[float, arg(metavar="RATE")] = 2e-5
    """Learning rate at the end."""
    warmup_steps: Annotated[int, arg(metavar="STEPS")] = 200
    """Linear warm-up of the learning rate."""
    clip: Annotated[float, arg(metavar="NORM")] = 1.0
    """Gradient norm above which gradients are scaled down."""
    temperature: Annotated[tuple[float, float], arg(metavar="START END")] = (1.0, 1 / 16)
    """Gumbel-softmax temperature: END + (START - END) (1 + cos(pi s / S)) / 2 at step s, with
    S = temperature_share * steps, then END."""
    temperature_share: Annotated[float, arg(metavar="SHARE")] = 0.8
    """Share of the steps over which the temperature falls."""
    kl_weight: Annotated[float, arg(metavar="WEIGHT")] = 0.1
    """Final weight beta of the KL term in  R + beta KL / (channels * stride^2)."""
    prior: Literal["uniform", "usage"] = "uniform"
    """What KL measures from: uniform, as published, or how often each code is used (from the end of
    the learning rate's warm-up on): plain areas then share few codes."""
    kl_warmup_share: Annotated[float, arg(metavar="SHARE")] = 0.2
    """Share of the steps over which beta rises from 0, by half a cosine."""
    dead_share: Annotated[float, arg(metavar="SHARE")] = 0.02
    """A code is dead when it takes less than this share of its fair share (1 / codes)."""
    revive_every: Annotated[int, arg(metavar="STEPS")] = 100
    """Every so many steps dead codes are restarted beside busy ones, in the first 80 % of the
    steps; 0: never."""

    seed: int = 0
    """Of weights, noise, order and crops."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda[:N]")] = "auto"
    """auto: the first GPU where there is one, else the CPU."""
    loader: Literal["auto", "dali", "reference"] = "auto"
    """Who decodes, as in pre-training."""
    workers: Annotated[int | None, arg(metavar="COUNT")] = None
    """Decoding processes; none: chosen by the loader."""
    validation_images: Annotated[int, arg(metavar="IMAGES")] = 512
    """Images, at most, behind the validation figures."""
    log_every: Annotated[int, arg(metavar="STEPS")] = 100
    """Steps between lines of metrics."""
    save_every: Annotated[int, arg(metavar="STEPS")] = 5_000
    """Steps between saves; each replaces the last, whole or not at all."""
    store: Literal["fp32", "fp16"] = "fp32"
    """Precision of the weights in the file."""

    def network(self) -> DvaeConfig:
        """The network asked for. ValueError names what can't be."""
        return DvaeConfig(
            channels=self.channels,
            codes=self.codes,
            widths=self.widths,
            blocks_per_group=self.blocks_per_group,
            kernel=self.kernel,
            code_width=self.code_width,
            likelihood=self.likelihood,
        )

    def validate(self) -> None:
        """Refuses settings that can't work. Raises ValueError with the remedy."""
        stride = self.network().stride
        if self.codes > 8192:
            raise ValueError(f"--codes must be at most 8192, got {self.codes}")
        if self.image_px < stride:
            raise ValueError(
                f"--image-px {self.image_px} is smaller than one token of {stride} x {stride} "
                f"pixels: give at least {stride}, or fewer --widths (now {len(self.widths)})"
            )
        if self.image_px % stride:
            below = self.image_px // stride * stride
            raise ValueError(
                f"--image-px must be a multiple of the token's {stride} pixels, got "
                f"{self.image_px}: give {below} or {below + stride}"
            )
        if self.out.suffix != ".safetensors":
            raise ValueError(f"--out must end in .safetensors, got {self.out}")
        for name in ("steps", "batch", "log_every", "save_every", "validation_images"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least 1, got {getattr(self, name)}")
        for name in ("revive_every", "warmup_steps", "kl_weight"):
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must not be negative, got {getattr(self, name)}")
        if min(self.temperature) <= 0:
            raise ValueError(f"--temperature must be positive, got {self.temperature}")
        if self.lr <= 0 or not 0 <= self.lr_final <= self.lr or self.clip <= 0:
            raise ValueError(
                f"expected 0 <= lr-final <= lr, lr > 0 and clip > 0, got lr {self.lr}, "
                f"lr-final {self.lr_final}, clip {self.clip}"
            )
        for name in ("temperature_share", "kl_warmup_share", "dead_share"):
            if not 0 <= getattr(self, name) <= 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be in [0, 1], got {getattr(self, name)}")
