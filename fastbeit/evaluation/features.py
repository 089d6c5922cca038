"""Frozen features for the probe and kNN: every block's output, pooled two ways.

Shapes: N images, C channels, h x w pixels, L blocks, T tokens, D width. Images are resized by their
short side and centre-cropped as in evaluation on ImageNet (short side 256, crop 224: a crop share
of 0.875); one that already has the model's size, like the demo's, is taken as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastbeit.data.decode import decode_image
from fastbeit.data.header import BadImage
from fastbeit.data.source import Source

POOLINGS = ("cls", "mean")
# Raw pixels of larger images are averaged down to a square of this side: a probe on 150,528
# dimensions would need more memory than it is worth as a yardstick.
RAW_SIDE = 32


class LabelledImages(NamedTuple):
    """Decoded images in memory.

    Attributes:
        pixels: ``[N, C, h, w]`` uint8.
        labels: ``[N]`` int64.
        bad: names of images that could not be decoded and are left out.
    """

    pixels: np.ndarray
    labels: np.ndarray
    bad: list[str]


def load_images(
    source: Source,
    *,
    size: tuple[int, int],
    channels: int = 3,
    limit: int | None = None,
    seed: int = 0,
    crop_share: float = 0.875,
) -> LabelledImages:
    """Decodes a labelled source, or a random ``limit`` of it, to ``[N, C, h, w]`` uint8.

    Memory is N*C*h*w bytes: 1.5 GB for 10,000 images of 224 x 224; ``limit`` bounds it.

    Raises:
        ValueError: a source without labels, or with no image that can be decoded.
    """
    if source.labels is None:
        raise ValueError(
            "a probe needs labels, and this source has none: use a folder with a sub-folder a "
            "class, or leave evaluation out"
        )
    chosen = np.arange(len(source))
    if limit is not None and limit < len(source):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(source))[:limit])
    pixels, labels, bad = [], [], []
    for index in chosen.tolist():
        try:
            array = decode_image(source.read(index), channels=channels)
        except (BadImage, OSError):
            bad.append(source.name(index))
            continue
        pixels.append(_centre_view(array, size, crop_share))
        labels.append(int(source.labels[index]))
    if not pixels:
        raise ValueError(f"none of the {len(chosen)} images of this source can be decoded")
    return LabelledImages(np.stack(pixels), np.array(labels, dtype=np.int64), bad)


@torch.inference_mode()
def extract_features(
    model: nn.Module,
    pixels: np.ndarray,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int = 250,
) -> np.ndarray:
    """Features of every block for ``pixels`` ``[N, C, h, w]`` uint8.

    Runs on the model's device in the model's dtype, in evaluation mode (which is put back after).

    Returns:
        ``[L, 2, N, D]`` float32: blocks, poolings (CLS token; mean of the patch tokens), images.
    """
    parameter = next(model.parameters())
    layer_features: Any = model.layer_features
    was_training = model.training
    model.eval()
    rows = []
    try:
        for start in range(0, len(pixels), batch_size):
            batch = torch.from_numpy(pixels[start : start + batch_size]).to(parameter.device)
            images = normalise(batch, mean, std).to(parameter.dtype)
            tokens: list[Tensor] = layer_features(images)
            pooled = [torch.stack([t[:, 0], t[:, 1:].mean(1)]) for t in tokens]
            rows.append(torch.stack(pooled).float().cpu())
    finally:
        model.train(was_training)
    return torch.cat(rows, dim=2).numpy()


def raw_pixels(pixels: np.ndarray) -> np.ndarray:
    """``[1, 1, N, P]`` float32 in 0 to 1: the images themselves as features.

    Channels that are equal throughout (grey images) count once; images larger than
    ``RAW_SIDE`` x ``RAW_SIDE`` are averaged down to it.
    """
    if pixels.shape[1] > 1 and (pixels == pixels[:, :1]).all():
        pixels = pixels[:, :1]
    height, width = pixels.shape[2:]
    chunks = []
    for start in range(0, len(pixels), 1000):
        images = torch.from_numpy(pixels[start : start + 1000]).float() / 255
        if height * width > RAW_SIDE * RAW_SIDE:
            images = nn.functional.adaptive_avg_pool2d(images, RAW_SIDE)
        chunks.append(images.flatten(1))
    return torch.cat(chunks).numpy()[None, None]


def normalise(batch: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``[B, C, h, w]`` uint8 -> float32 ``(x / 255 - mean) / std``, the first C values of each."""
    channels = batch.shape[1]
    if len(mean) < channels or len(std) < channels:
        raise ValueError(
            f"mean and std need one value for each of the {channels} channels, got {len(mean)} "
            f"and {len(std)}"
        )
    shape = (1, channels, 1, 1)
    mean_1C11 = torch.tensor(mean[:channels], device=batch.device).view(shape)
    std_1C11 = torch.tensor(std[:channels], device=batch.device).view(shape)
    return (batch.float() / 255 - mean_1C11) / std_1C11


def _centre_view(array: np.ndarray, size: tuple[int, int], crop_share: float) -> np.ndarray:
    """``[C, h, w]`` uint8 of the middle of ``array`` ``[H, W, C]``."""
    height, width = size
    if array.shape[:2] != size:
        image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        # The crop then covers crop_share of the side that limits it.
        scale = max(height / image.height, width / image.width) / crop_share
        resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
        image = image.resize(resized, Image.Resampling.BICUBIC)
        array = np.asarray(image.crop((left, top, left + width, top + height)))
        array = array.reshape(height, width, -1)
    return np.ascontiguousarray(array.transpose(2, 0, 1))
