"""The two views of an image: the student's and the tokenizer's, from one crop box.

``draw_views`` executes one sample's plan with PIL and is the specification of what every loader
must give: jitter of the full image in the plan's order, flip, crop, and only then resize, twice.
(A resize that is handed the box reads pixels outside it.) Results are uint8, as PIL truncates them
after every step. ``finish_views`` turns a batch of them into what the networks take, on the device,
so that one byte a channel crosses the bus.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastbeit.data.plan import Plan

BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TABLE_PAYS_FROM = 128 * 128
_RAMP = Image.frombytes("L", (256, 1), bytes(range(256)))


@dataclass(frozen=True)
class ViewSpec:
    """Sizes and ranges of the two views.

    Attributes:
        size: (height, width) of the student's images, pixels.
        token_size: (height, width) of the tokenizer's images, pixels.
        resample, token_resample: "bilinear", "bicubic" or "lanczos", all antialiased.
        channels: 3 (RGB) or 1 (grey), of both views.
        mean, std: per channel, of pixels in [0, 1]; the student's are (x - mean) / std. The first
            ``channels`` values are used; ImageNet's by default.
        token_scale, token_offset: the tokenizer's pixels are x * scale + offset, x in [0, 1].

    Raises:
        ValueError: a value outside its range.
    """

    size: tuple[int, int] = (224, 224)
    token_size: tuple[int, int] = (112, 112)
    resample: str = "bicubic"
    token_resample: str = "lanczos"
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    token_scale: float = 0.8
    token_offset: float = 0.1

    def __post_init__(self) -> None:
        for name in ("size", "token_size"):
            if len(getattr(self, name)) != 2 or min(getattr(self, name)) < 1:
                raise ValueError(
                    f"{name} must be (height, width) in pixels, at least 1 each, "
                    f"got {getattr(self, name)}"
                )
        for name in ("resample", "token_resample"):
            if getattr(self, name) not in FILTERS:
                raise ValueError(
                    f"{name} must be one of {', '.join(FILTERS)}, got {getattr(self, name)!r}"
                )
        if self.channels not in (1, 3):
            raise ValueError(
                f"channels must be 3 (RGB) or 1 (grey), got {self.channels}: encoded image files "
                "hold no others; feed other data to the model with a loader of your own"
            )
        if len(self.mean) < self.channels or len(self.std) < self.channels:
            raise ValueError(
                f"mean and std need a value for each of {self.channels} channels, "
                f"got {self.mean} and {self.std}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")


def draw_views(
    image: Image.Image, plan: Plan, row: int, views: ViewSpec
) -> tuple[Image.Image, Image.Image]:
    """The student's and the tokenizer's view of one decoded image, by row ``row`` of ``plan``.

    Args:
        image: upright, mode RGB or L.
    """
    top, left, height, width = plan.box[row].tolist()
    flip = bool(plan.flip[row])
    if flip:  # the box is in the flipped image: cut its mirror image and flip only that
        left = image.width - left - width
    crop = _jitter_and_crop(
        image,
        plan.jitter[row].tolist(),
        plan.jitter_order[row].tolist(),
        (left, top, left + width, top + height),
    )
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return (
        resize(crop, views.size, FILTERS[views.resample]),
        resize(crop, views.token_size, FILTERS[views.token_resample]),
    )


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resize to (height, width): rows first, then columns, uint8 in between.

    PIL's two passes, called one by one: up to version 12 it always took them in this order, and
    from 13 on it takes columns first where that is cheaper, which gives slightly other pixels.
    """
    height, width = size
    if image.width != width:
        image = image.resize((width, image.height), resample)
    return image if image.height == height else image.resize((width, height), resample)


def jitter(image: Image.Image, factors: list[float], order: list[int]) -> Image.Image:
    """Brightness, contrast and saturation of the whole image, applied in ``order``."""
    return _jitter_and_crop(image, factors, order, (0, 0, image.width, image.height))


def _jitter_and_crop(
    image: Image.Image, factors: list[float], order: list[int], box: tuple[int, int, int, int]
) -> Image.Image:
    """Jitter of the full image, then crop.

    Only contrast looks beyond a pixel, at the mean of the whole image: from there on (or from the
    start, without contrast) nothing outside the box matters, and the crop is taken early.
    """
    steps = [step for step in order if factors[step] != 1.0]
    if image.mode == "L":
        steps = [step for step in steps if step != SATURATION]  # a grey image is its own luma
    cropped = CONTRAST not in steps
    if cropped:
        image = image.crop(box)
    for step in steps:
        if step == SATURATION:
            image = Image.blend(image.convert("L").convert(image.mode), image, factors[step])
            continue
        towards = 0
        if step == CONTRAST:
            towards = _mean_luma(image)
            image, cropped = image.crop(box), True
        image = _blend_with(image, towards, factors[step])
    return image if cropped else image.crop(box)


def _blend_with(image: Image.Image, value: int, factor: float) -> Image.Image:
    """``value + factor * (pixel - value)`` of every channel, truncated to uint8 as PIL does."""
    if image.width * image.height < _TABLE_PAYS_FROM:
        constant = Image.new(image.mode, image.size, (value,) * len(image.getbands()))
        return Image.blend(constant, image, factor)
    # The same for the 256 possible values, then looked up: half the time on a photo.
    table = Image.blend(Image.new("L", (256, 1), value), _RAMP, factor).tobytes()
    return image.point(list(table) * len(image.getbands()))


def _mean_luma(image: Image.Image) -> int:
    """floor(mean + 0.5) of the luma, the value PIL's contrast blends towards."""
    total = int(np.asarray(image.convert("L")).sum(dtype=np.int64))
    return int(total / (image.width * image.height) + 0.5)


def finish_views(
    images: Tensor | NDArray[np.uint8],
    token_images: Tensor | NDArray[np.uint8],
    views: ViewSpec,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """uint8 views ``[B, h, w, C]`` to float ``[B, C, h, w]`` on ``device``, channels-last.

    Returns:
        The student's images, (x / 255 - mean) / std, and the tokenizer's, x / 255 * scale + offset;
        computed in float32, given in ``dtype``.
    """
    image_scale, image_shift, token_scale, token_shift = _constants(views, torch.device(device))
    return (
        _affine(images, image_scale, image_shift, dtype),
        _affine(token_images, token_scale, token_shift, dtype),
    )


@lru_cache(maxsize=16)
def _constants(views: ViewSpec, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale and shift ``[C]`` of both views in float32, copied to the device once."""
    C = views.channels
    mean_C = torch.tensor(views.mean[:C], dtype=torch.float64)
    std_C = torch.tensor(views.std[:C], dtype=torch.float64)
    token_C = torch.ones(C, dtype=torch.float64)
    image_scale, image_shift, token_scale, token_shift = (
        constant.to(device, torch.float32)
        for constant in (
            1 / (255 * std_C),
            -mean_C / std_C,
            token_C * (views.token_scale / 255),
            token_C * views.token_offset,
        )
    )
    return image_scale, image_shift, token_scale, token_shift


def _affine(
    pixels: Tensor | NDArray[np.uint8], scale_C: Tensor, shift_C: Tensor, dtype: torch.dtype
) -> Tensor:
    if not isinstance(pixels, Tensor):
        pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    on_device = pixels.to(scale_C.device, non_blocking=True)
    result_BHWC = on_device.to(torch.float32).mul_(scale_C).add_(shift_C)
    return result_BHWC.to(dtype).permute(0, 3, 1, 2)
