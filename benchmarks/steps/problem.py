"""One training problem: sizes, weights and a batch, the same for whoever is timed on it."""

from __future__ import annotations

import copy
import functools
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.roofline import Work
from fastbeit import environment
from fastbeit.batch import MimBatch
from fastbeit.data import MaskSpec, draw_masks, mask_positions
from fastbeit.model import Backends, BeitConfig, BeitForMim
from fastbeit.model.backends import AUTO
from fastbeit.recipes.demo import config as recipe
from fastbeit.tokenizer import load_tokenizer
from fastbeit.tokenizer.dvae import DvaeConfig, Encoder, initialise
from fastbeit.training.cost import count_parameters, student_flops, tokenizer_flops

SEED = 0
FLOAT_BYTES = 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """Sizes of a student, its tokenizer and a batch.

    Without DropPath: others draw theirs themselves, and results could not be compared.
    """

    name: str
    model: BeitConfig
    dvae: DvaeConfig
    batch: int
    masked: int
    """Patches that the masks aim at, in an image."""

    @property
    def sizes(self) -> dict[str, Any]:
        """What tells a row apart."""
        return {"model": self.name, "image": self.model.image_hw[0], "batch": self.batch}

    @property
    def token_side(self) -> tuple[int, int]:
        """Pixels down and across of the tokenizer's view."""
        rows, columns = self.model.grid
        return rows * self.dvae.stride, columns * self.dvae.stride

    def student(self, kind: type[BeitForMim] = BeitForMim, backends: Backends = AUTO) -> BeitForMim:
        """A model of one's own with the problem's weights."""
        return copy.deepcopy(_student(self, kind, backends))

    def encoder(self) -> Encoder:
        """The tokenizer's network with random weights. Its head's bias takes the mean off each
        score, for without that a few of the codes win everywhere."""
        encoder = Encoder(self.dvae)
        generator = torch.Generator().manual_seed(SEED)
        initialise(encoder, generator)
        images = self._token_images(1, generator)
        with torch.no_grad():
            encoder.head.b.copy_(-encoder(images).mean(dim=(0, 2, 3)))
        return encoder.requires_grad_(False).eval()

    def batch_on(self, device: torch.device | str = CPU) -> MimBatch:
        """Random images, and masks as they are drawn in training."""
        generator = torch.Generator().manual_seed(SEED + 1)
        config = self.model
        images = torch.randn(
            self.batch, config.in_channels, *config.image_hw, generator=generator
        ).contiguous(memory_format=torch.channels_last)
        spec = MaskSpec(grid=config.grid, target=self.masked, min_block=min(16, self.masked // 2))
        masks = draw_masks(spec, SEED, 0, np.arange(self.batch))
        return MimBatch(
            images=images,
            token_images=self._token_images(self.batch, generator),
            positions=torch.from_numpy(mask_positions(masks, spec.slots)),
            drop_scale=None,
            index=torch.arange(self.batch),
        ).to(device)

    def _token_images(self, count: int, generator: torch.Generator) -> Tensor:
        """Smooth random pictures: of pure noise all tokens are alike."""
        height, width = self.token_side
        coarse = torch.rand(
            count, self.dvae.channels, math.ceil(height / 4), math.ceil(width / 4),
            generator=generator,
        )  # fmt: skip
        fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        return self.dvae.pixel_offset + self.dvae.pixel_scale * fine

    def tokenizer_work(self, dtype: torch.dtype = torch.float32) -> Work:
        """Least work to encode the batch: the head on masked patches, weights and images once."""
        flops = tokenizer_flops(self.dvae, self.model.grid, self.masked).total
        height, width = self.token_side
        weights = _numbers(self.dvae)
        pixels = self.batch * self.dvae.channels * height * width
        return Work(self.batch * flops, dtype.itemsize * (weights + pixels))

    def forward_work(self, dtype: torch.dtype = torch.float32) -> Work:
        """Least work of the student's forward pass and loss: weights, as they are kept in fp32, and
        images read once."""
        flops = student_flops(self.model, self.masked).forward
        moved = FLOAT_BYTES * self._parameters + dtype.itemsize * self._pixels
        return Work(self.batch * flops, moved)

    def both_work(self, dtype: torch.dtype = torch.float32) -> Work:
        """Forward and backward: weights read in fp32, then again in ``dtype``; their gradients
        written in fp32; images read twice."""
        flops = student_flops(self.model, self.masked).total
        weights = (2 * FLOAT_BYTES + dtype.itemsize) * self._parameters
        return Work(self.batch * flops, weights + 2 * dtype.itemsize * self._pixels)

    def step_work(self, dtype: torch.dtype = torch.float32) -> Work:
        """A whole step: AdamW reads a weight, its gradient and moments, and writes all but the
        gradient back."""
        update = Work(0, FLOAT_BYTES * 7 * self._parameters)
        return self.tokenizer_work(dtype) + self.both_work(dtype) + update

    @property
    def _parameters(self) -> int:
        return count_parameters(self.model).trained

    @property
    def _pixels(self) -> int:
        height, width = self.model.image_hw
        return self.batch * self.model.in_channels * height * width


@functools.cache
def _numbers(dvae: DvaeConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Encoder(dvae).parameters())


@functools.cache
def _student(problem: Problem, kind: type[BeitForMim], backends: Backends) -> BeitForMim:
    """Built once, for drawing ViT-B's weights takes as long as a step. LayerScale is at 1 and the
    relative table random, so that no branch is faint."""
    model = kind(problem.model, seed=SEED, backends=backends)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.fill_(1.0)
            elif name.endswith("relative_position_bias_table"):
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(SEED))
    return model


BASE = Problem("ViT-B", BeitConfig(drop_path=0.0), DvaeConfig(), batch=2, masked=75)
GPU_BATCH = 128
TINY_VARIABLE = "FASTBEIT_BENCH_TINY"
TINY = Problem(
    "tiny",
    BeitConfig(image_size=32, patch_size=4, width=32, depth=2, heads=2, drop_path=0.0,
               vocab_size=64),
    DvaeConfig(codes=64, widths=(16, 16), blocks_per_group=1, kernel=3),
    batch=2,
    masked=20,
)  # fmt: skip
"""For tests: every part of `BASE`, in milliseconds."""


def base_for(device_type: str) -> Problem:
    """ViT-B at 224 pixels; a CPU takes seconds for an image, a GPU wants many at once. `TINY` where
    the environment variable FASTBEIT_BENCH_TINY is set, to try the code."""
    if os.environ.get(TINY_VARIABLE):
        return TINY
    return BASE if device_type == "cpu" else replace(BASE, batch=GPU_BATCH)


def demo() -> Problem:
    """The demo recipe's model and tokenizer: 28 pixels, four blocks of 128."""
    config = recipe()
    model = replace(config.model, drop_path=0.0)
    dvae = load_tokenizer(config.tokenizer.tokenizer).config
    return Problem("demo", model, dvae, config.run.global_batch, config.mask.target)


def emulated(device_type: str, dtype: torch.dtype) -> str | None:
    """Why products of ``dtype`` would be emulated, tens of times slower; None where they aren't."""
    if device_type != "cpu" or dtype == torch.float32:
        return None
    if dtype == torch.bfloat16 and environment.cpu_bf16() is not None:
        return None
    return f"this CPU has no {str(dtype).removeprefix('torch.')} products: they would be emulated"


def masked_map(positions: Tensor, patches: int) -> Tensor:
    """``[B, N]`` boolean of ``[B, M]`` positions, as other codes take it."""
    filled = torch.where(positions >= 0, positions, patches).long()
    spread = torch.zeros(len(positions), patches + 1, dtype=torch.bool, device=positions.device)
    return spread.scatter_(1, filled, True)[:, :patches]
