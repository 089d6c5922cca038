"""The plan as a DALI graph: decode, jitter, crop, flip, and both resizes from one decode.

Jitter. Brightness, contrast and saturation are each ``D + f (x - D)``, clamped and truncated to
uint8, with D = 0, the mean luma m of the whole image, or the pixel's own luma L. The order differs
from sample to sample, so there are three equal stages, and the plan's choice lies in numbers: the
five channels (R, G, B, L, m) are multiplied by a 3x5 matrix per sample and stage. m is
floor(mean + 0.5), as PIL has it, taken from the image as it is at that moment. Truncation is
rounding after subtracting a half; a little less, so that exact integers stay (an identity stage
changes nothing).

A stage that a sample does not need is the identity; without any jitter in the plan the stages are
left out. One graph serves both devices: "mixed" decoding and GPU operators, or CPU throughout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import nvidia.dali as dali
from numpy.typing import NDArray
from nvidia.dali import fn as dali_fn
from nvidia.dali import math as dali_math
from nvidia.dali import types as dali_types

from fastbeit.data.backend import HW_DECODER_LOAD
from fastbeit.data.plan import Plan
from fastbeit.data.views import CONTRAST, SATURATION, ViewSpec

# DALI's stubs know neither the names in ``types`` nor that one input gives one output.
fn: Any = dali_fn
types: Any = dali_types
Node = Any  # nvidia.dali.data_node.DataNode

STAGES = 3
# Where PIL's blend is exact (a grey pixel, a factor of 1) these float32 sums are off by up to
# 3.5e-5: half an ulp of f x <= 357, of (1 - f) D and of two sums. The margin is just above that.
_TRUNCATE = -0.49995
_FILTERS = {
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
}


def build_pipeline(
    views: ViewSpec,
    *,
    batch: int,
    jitter: bool,
    depth: int,
    threads: int,
    device_id: int | None,
    hw_decoder_load: float = HW_DECODER_LOAD,
) -> dali.Pipeline:
    """The whole graph. Feed ``pipeline_inputs``; it gives (images, token_images, shapes).

    Args:
        views: sizes and filters.
        batch: samples per run.
        jitter: whether any sample may need it.
        depth: runs that may be under way at once.
        threads: CPU threads of the pipeline.
        device_id: CUDA device; None for a CPU.
        hw_decoder_load: share of a batch's JPEGs for the GPU's own decoder, where it has one; the
            others are decoded by its multiprocessors and ``threads``.

    The views come as uint8 ``[h, w, C]``, the shapes as those of the decoded images.
    """
    pipeline = dali.Pipeline(
        batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=depth
    )
    with pipeline:
        decoded = _decode(device_id, hw_decoder_load)
        shapes = decoded.shape(dtype=types.INT32)
        image = decoded
        if views.channels == 1:
            image = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
        if jitter:
            matrices = fn.external_source(name="matrices", dtype=types.FLOAT, ndim=3)
            for number in range(STAGES):
                image = _jitter_stage(image, matrices[number], views.channels)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        # Crop, then resize: a resize that is given the region reads pixels outside it.
        crop = fn.flip(fn.slice(image, start=start, shape=shape, axes=(0, 1)), horizontal=flip)
        pipeline.set_outputs(
            _resize(crop, views.size, views.resample),
            _resize(crop, views.token_size, views.token_resample),
            shapes,
        )
    pipeline.build()
    return pipeline


def build_decoder(device_id: int | None) -> dali.Pipeline:
    """Decodes one file and gives its shape: to find the one that fails."""
    pipeline = dali.Pipeline(
        batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1
    )
    with pipeline:
        decoded = _decode(device_id)
        # The pixels are an output too, or the decoder would be pruned from the graph.
        pipeline.set_outputs(decoded, decoded.shape(dtype=types.INT32))
    pipeline.build()
    return pipeline


def pipeline_inputs(
    plan: Plan, sizes: NDArray[np.int32], channels: int, *, jitter: bool
) -> dict[str, NDArray[Any]]:
    """The plan as the arrays that the graph of ``build_pipeline`` takes, the files apart."""
    top_B, left_B, height_B, width_B = plan.box.T
    # The box is in the flipped image; the graph cuts its mirror image and flips only that.
    left_B = np.where(plan.flip, sizes[:, 1] - left_B - width_B, left_B)
    arrays: dict[str, NDArray[Any]] = {
        "start": np.stack([top_B, left_B], axis=1).astype(np.int32),
        "shape": np.stack([height_B, width_B], axis=1).astype(np.int32),
        "flip": plan.flip.astype(np.int32),
    }
    if jitter:
        arrays["matrices"] = jitter_matrices(plan.jitter, plan.jitter_order, channels)
    return arrays


def jitter_matrices(
    factors: NDArray[np.float32], order: NDArray[np.uint8], channels: int
) -> NDArray[np.float32]:
    """float32 ``[B, stages, C, C + 2]`` (for grey ``[B, stages, 1, 2]``: there is no luma apart).

    Args:
        factors: ``[B, 3]`` of brightness, contrast, saturation.
        order: ``[B, 3]``, which of them each stage applies.
    """
    step_BS = order.astype(np.int64)
    factor_BS = np.take_along_axis(factors, step_BS, axis=1)
    if channels == 1:  # a grey image is its own luma: saturation changes nothing
        factor_BS = np.where(step_BS == SATURATION, np.float32(1), factor_BS)
    rest_BS = 1 - factor_BS
    luma = 1 if channels == 3 else 0
    matrices = np.zeros((*step_BS.shape, channels, channels + luma + 1), np.float32)
    for channel in range(channels):
        matrices[:, :, channel, channel] = factor_BS
    if luma:
        matrices[..., channels] = np.where(step_BS == SATURATION, rest_BS, 0)[..., None]
    matrices[..., -1] = np.where(step_BS == CONTRAST, rest_BS, 0)[..., None]
    return matrices


def _decode(device_id: int | None, hw_decoder_load: float = HW_DECODER_LOAD) -> Node:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    if device_id is None:
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
    # nvJPEG's default repeats chroma samples; PIL and the CPU decoder interpolate them.
    return fn.decoders.image(
        encoded,
        device="mixed",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
        hw_decoder_load=hw_decoder_load,
    )


def _jitter_stage(image: Node, matrix: Node, channels: int) -> Node:
    luma = image
    if channels == 3:
        luma = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    mean = dali_math.floor(fn.reductions.mean(luma, keep_dims=True) + 0.5)
    mean = fn.cast(mean, dtype=types.UINT8)
    everywhere = dali_math.clamp(luma, mean, mean)  # the mean, as a channel of the image
    features = [image, luma, everywhere] if channels == 3 else [image, everywhere]
    jittered = fn.coord_transform(
        fn.cat(*features, axis=2), M=matrix, T=[_TRUNCATE] * channels, dtype=types.UINT8
    )
    return fn.reshape(jittered, layout="HWC")


def _resize(image: Node, size: tuple[int, int], resample: str) -> Node:
    """Rows first, then columns, each rounded and clamped to uint8, as ``views.resize`` does it.

    Left to itself DALI keeps float between the passes, and repeats the border pixel where a filter
    reaches beyond it; PIL leaves such taps out and divides by the sum of the others. On crops of a
    few pixels that is another picture: up to 15 / 255 off on 3x5 pixels, 28 / 255 on a dithered
    image (99th percentile). So a pass gets a border of zeros outside its region of interest, which
    DALI repeats, and is divided by ones that went through the same filter.
    """
    for axis, side in ((1, "resize_x"), (0, "resize_y")):
        # A line of ones along the axis, from the image so that it has its length.
        line = fn.slice(image, start=[0, 0], shape=[1, 1], axes=(1 - axis, 2))
        ones = fn.cast((line & 0) | 1, dtype=types.UINT8)
        sums, weights = (
            fn.resize(
                _with_zeros(pixels, axis),
                roi_start=[float(axis == 0), float(axis == 1)],
                roi_end=_extent(pixels) + np.array([axis == 0, axis == 1], np.float32),
                interp_type=_FILTERS[resample],
                antialias=True,
                dtype=types.FLOAT,
                mode="stretch",
                **{side: size[axis]},
            )
            for pixels in (image, ones)
        )
        image = fn.cast(sums / weights, dtype=types.UINT8)
    return image


def _with_zeros(image: Node, axis: int) -> Node:
    """One zero before and one behind along ``axis``."""
    length = image.shape(dtype=types.INT32)[axis : axis + 1]
    return fn.slice(
        image,
        start=[-1],
        shape=length + 2,
        axes=(axis,),
        out_of_bounds_policy="pad",
        fill_values=[0.0],
    )


def _extent(image: Node) -> Node:
    """Height and width as float."""
    return fn.cast(image.shape(dtype=types.INT32)[0:2], dtype=types.FLOAT)
