"""What a step costs, counted: parameters, and FLOPs an image of student and tokenizer.

A multiply-accumulate is two FLOPs; norms, activations, softmax and the bias are left out (below 1 %
of the arithmetic, and bound by memory). Counted is what is computed: the last block and the two
heads work on the mask slots only, so ``pruned=False`` gives the figure to compare with other codes.
N patches, T = N + 1 tokens, M mask slots, D width, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from fastbeit.model import BeitConfig
from fastbeit.tokenizer.dvae import DvaeConfig
from fastbeit.training.config import PretrainConfig
from fastbeit.training.peak import PeakFlops, peak_flops


class Parameters(NamedTuple):
    """Numbers in the masked-image model."""

    trained: int
    """As the official code counts them."""
    stored: int
    """With the untrained key third of each packed qkv bias: what memory and checkpoints hold."""


class StudentFlops(NamedTuple):
    """FLOPs of one image's forward pass, by part."""

    patch_embedding: int
    block_linears: int
    attention: int
    head: int

    @property
    def forward(self) -> int:
        return sum(self)

    @property
    def backward(self) -> int:
        """Two products for each of the forward pass; the images themselves need no gradient."""
        return 2 * sum(self) - self.patch_embedding

    @property
    def total(self) -> int:
        return self.forward + self.backward


class TokenizerFlops(NamedTuple):
    """FLOPs of encoding one image, by part."""

    body: int
    head: int

    @property
    def total(self) -> int:
        return self.body + self.head


def block_parameters(model: BeitConfig) -> int:
    """Numbers in one block, the key bias (zero, untrained) left out."""
    width, hidden = model.width, model.mlp_width
    attention = 3 * width * width + 2 * width + width * width + width
    mlp = width * hidden + hidden + hidden * width + width
    norms = 4 * width
    scales = 2 * width if model.layer_scale is not None else 0
    table = relative_table_numbers(model) if model.position == "relative_per_block" else 0
    return attention + mlp + norms + scales + table


def relative_table_numbers(model: BeitConfig) -> int:
    """Numbers in one relative-position table: every offset, and three for CLS, for each head."""
    rows, columns = model.grid
    return ((2 * rows - 1) * (2 * columns - 1) + 3) * model.heads


def count_parameters(model: BeitConfig) -> Parameters:
    """Numbers in ``BeitForMim(model)``, from the sizes alone."""
    width = model.width
    patch = model.in_channels * model.patch_size**2 * width + width
    tokens = 2 * width  # CLS and mask token
    positions = 0
    if model.position == "absolute":
        positions = model.tokens * width
    elif model.position == "relative":
        positions = relative_table_numbers(model)
    head = 2 * width + width * model.vocab_size + model.vocab_size  # with the last norm
    trained = patch + tokens + positions + model.depth * block_parameters(model) + head
    return Parameters(trained, trained + model.depth * width)


def student_flops(model: BeitConfig, slots: int, *, pruned: bool = True) -> StudentFlops:
    """FLOPs of the student's forward pass on one image with ``slots`` mask slots.

    Args:
        pruned: the last block's queries, projection and MLP run on the slots only, as they do here;
            False counts them on all tokens.
    """
    width, tokens = model.width, model.tokens
    last = slots if pruned else tokens  # rows that the last block computes
    rows = (model.depth - 1) * tokens + last
    keys_and_values = model.depth * tokens * 2 * width * width
    queries_projection_mlp = rows * 2 * width * (width + model.mlp_width)
    return StudentFlops(
        patch_embedding=2 * model.patches * model.in_channels * model.patch_size**2 * width,
        block_linears=2 * (keys_and_values + queries_projection_mlp),
        attention=2 * rows * 2 * tokens * width,
        head=2 * slots * width * model.vocab_size,
    )


def tokenizer_flops(
    dvae: DvaeConfig, grid: tuple[int, int], slots: int | None = None
) -> TokenizerFlops:
    """FLOPs of a discrete VAE's encoder on one image of ``grid`` tokens.

    Args:
        slots: tokens that the head is computed for; None: all.
    """
    tokens = grid[0] * grid[1]
    pixels = tokens * dvae.stride**2
    inputs = dvae.widths[0]
    macs = pixels * dvae.kernel**2 * dvae.channels * inputs
    for width in dvae.widths:
        hidden = width // 4
        for _ in range(dvae.blocks_per_group):
            branch = 9 * inputs * hidden + 2 * 9 * hidden * hidden + hidden * width
            identity = inputs * width if inputs != width else 0
            macs += pixels * (branch + identity)
            inputs = width
        pixels //= 4  # the pooling between groups
    head = (tokens if slots is None else slots) * dvae.widths[-1] * dvae.codes
    return TokenizerFlops(body=2 * macs, head=2 * head)


def step_flops(config: PretrainConfig, tokenizer_flops: float) -> float:
    """FLOPs that training takes for one image: forward and backward of the student, as computed,
    and ``tokenizer_flops`` for its tokens."""
    return student_flops(config.model, config.mask.target).total + tokenizer_flops


@dataclass(frozen=True)
class MfuMeter:
    """Turns images per second into the share of a device's stated peak."""

    flops_per_image: float
    peak: PeakFlops

    def mfu(self, images_per_s: float) -> float | None:
        """FLOPs per second of one device over its peak, 0 to 1; None where no peak is stated."""
        if self.peak.flops_per_s is None:
            return None
        return images_per_s * self.flops_per_image / self.peak.flops_per_s

    @property
    def label(self) -> str | None:
        """What the share is of, to print beside it; None where no peak is stated."""
        return None if self.peak.flops_per_s is None else self.peak.source


class _HasDvaeConfig(Protocol):
    """A tokenizer, as far as its cost goes."""

    @property
    def config(self) -> DvaeConfig: ...


def mfu_meter(
    config: PretrainConfig, tokenizer: _HasDvaeConfig, device: torch.device | str
) -> MfuMeter:
    """The meter of a run on ``device``, against the peak of the student's precision."""
    encoder = tokenizer_flops(tokenizer.config, config.model.grid, config.mask.target)
    flops = step_flops(config, encoder.total)
    assert config.run.precision != "auto", "settle the precision first"
    return MfuMeter(flops, peak_flops(device, config.run.precision))
