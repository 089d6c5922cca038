"""Launches of the masked loss of a linear head, forward and backward.

The three products between them are cuBLAS's and not here: 2 R D V FLOPs each, and the logits or
their gradient (R V elements) read or written once by each. BEiT-B at 128 images, bf16: 121 GFLOP
each, 0.15 ms of an H100's products, and 185 to 199 MB, 0.07 ms of its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .._cross_entropy import arguments as loss
from .._cross_entropy import configs
from .record import Record, meta


@dataclass(frozen=True)
class Shape:
    """B images of T tokens, M slots in each, D width, V classes."""

    model: str
    batch: int
    width: int
    tokens: int = 197
    slots: int = 75
    classes: int = 8192


TRAINING = (Shape("BEiT-B", 128, 768), Shape("BEiT-L", 64, 1024))
# Vocabularies of other tokenizers, and of ImageNet-1k and -21k: narrow rows, the longest whole
# row, rows that are no multiple of anything, the longest of all.
OTHERS = tuple(Shape(f"{v} classes", 32, 768, classes=v) for v in (1000, 16384, 21841, 65536))
# Operations on a logit: bias, largest, difference, power, sum; then product, label, sum for dbias.
FORWARD_FLOPS, GRADIENT_FLOPS = 5, 3


def loss_records(
    family: str, shape: Shape, dtype: torch.dtype, *, gradient: bool = True, smoothing: float = 0.0
) -> Iterator[Record]:
    """One or two passes over the logits, and the sums behind them."""
    size, classes = dtype.itemsize, shape.classes
    total, row = shape.batch * shape.slots, loss.row_length(shape.classes)
    logits, bias = meta(total, row, dtype=dtype), meta(classes, dtype=dtype)
    labels = meta(total, dtype=torch.int32)
    config = loss.config_of(logits, family)
    programs = loss.loss_programs(config, total, classes)
    losses, counts = meta(programs, dtype=torch.float32), meta(2, programs, dtype=torch.int32)
    partials = dbias = None
    if gradient:
        parts = loss.dbias_partials(config, total, classes)
        partials, dbias = meta(parts, row, dtype=torch.float32), meta(row, dtype=torch.float32)
    kind = ("" if gradient else ", no gradient") + (", smoothed" if smoothing else "")
    name = f"{shape.model}, {total} rows{kind}"
    element = str(dtype).removeprefix("torch.")
    once, partial_bytes = total * row * size, 0 if partials is None else partials.numel() * 4
    beside = classes * size + 4 * total + 12 * programs
    cells = total * classes

    if loss.is_whole(config, classes):
        flops = cells * (FORWARD_FLOPS + GRADIENT_FLOPS * gradient)
        moved = once * (1 + gradient) + partial_bytes + beside
        launch = loss.whole_launch(
            logits, bias, labels, losses, counts, partials, classes, smoothing, gradient, config
        )
        # The bias comes from L2 once a program, and then from the first-level cache.
        from_l2 = moved + (programs - 1) * classes * size
        yield Record(f"masked loss: {name}", element, launch, flops, flops, moved, from_l2)
    else:
        scales = meta(total, 2, dtype=torch.float32) if gradient else None
        first = loss.first_launch(
            logits, bias, labels, losses, counts, scales, classes, smoothing, config
        )
        flops, moved = cells * FORWARD_FLOPS, once + beside + 8 * total * gradient
        from_l2 = moved + (total - 1) * classes * size
        yield Record(f"masked loss, 1st pass: {name}", element, first, flops, flops, moved, from_l2)
        if scales is not None:
            second = loss.second_launch(
                logits, bias, labels, scales, partials, classes, smoothing, True, config
            )
            flops = cells * (2 + GRADIENT_FLOPS)
            moved = 2 * once + partial_bytes + classes * size + 12 * total
            blocks = -(-classes // configs.SECOND_BLOCK)
            from_l2 = moved + 12 * total * (blocks - 1)
            yield Record(
                f"masked loss, 2nd pass: {name}", element, second, flops, flops, moved, from_l2
            )
    nats, whole = meta(dtype=torch.float32), meta(dtype=torch.int64)
    launch = loss.sum_launch(losses, counts, partials, nats, whole, whole, dbias)
    moved = partial_bytes + (0 if dbias is None else 4 * row) + 12 * programs + 20
    yield Record(
        f"sum of masked loss: {name}", "float32", launch, partial_bytes // 4, 0, moved, moved
    )


def row_records(shape: Shape, dtype: torch.dtype) -> Iterator[Record]:
    """Gather of the masked rows, scatter of their gradient, scaling of the weight's."""
    size, width = dtype.itemsize, shape.width
    batch, tokens, slots = shape.batch, shape.tokens, shape.slots
    total = batch * slots
    rows, product = meta(total, width, dtype=dtype), meta(total, width, dtype=torch.float32)
    labels, sources = (meta(total, dtype=torch.int32) for _ in range(2))
    targets, positions = (
        meta(batch, slots, dtype=torch.int64),
        meta(batch, slots, dtype=torch.int32),
    )
    dloss, count = meta(dtype=torch.float32), meta(dtype=torch.int64)
    element = str(dtype).removeprefix("torch.")
    for named, of in ((positions, tokens), (None, slots)):
        hidden = meta(batch, of, width, dtype=dtype)
        name = f"{shape.model}, {slots} of {of}x{width}"
        launch = loss.gather_launch(hidden, named, targets, rows, labels, sources, shape.classes)
        moved = 2 * total * width * size + 16 * total + (0 if named is None else 4 * total)
        yield Record(f"gather masked rows: {name}", element, launch, 0, 0, moved, moved)
        launch = loss.scatter_launch(product, sources, dloss, count, hidden)
        moved = total * width * 4 + batch * of * width * size + 4 * total
        # Each block of rows looks through all slots of its image, once for each tile's width.
        looks = -(-of // configs.ROWS) * -(-width // configs.COLUMNS)
        seen = moved + 4 * total * (looks - 1)
        flops = total * width + batch * of * width
        yield Record(f"scatter masked rows: {name}", element, launch, flops, flops, moved, seen)
    for name, sides in (("weight", (shape.classes, width)), ("bias", (shape.classes,))):
        out = meta(*sides, dtype=dtype)
        launch = loss.scale_launch(meta(*sides, dtype=torch.float32), dloss, count, out)
        moved = out.numel() * (4 + size)
        label = f"scale gradient of head's {name}: {shape.model}, {'x'.join(map(str, sides))}"
        yield Record(label, element, launch, out.numel(), 0, moved, moved)


def records(family: str) -> Iterator[Record]:
    """Every launch of the masked loss on a GPU of a family."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in TRAINING:
            yield from row_records(shape, dtype)
            yield from loss_records(family, shape, dtype)
    half = torch.bfloat16
    yield from loss_records(family, TRAINING[0], half, gradient=False)
    yield from loss_records(family, TRAINING[0], half, smoothing=0.1)
    for shape in OTHERS:
        yield from loss_records(family, shape, half)
        yield from loss_records(family, shape, half, smoothing=0.1)
        yield from loss_records(family, shape, torch.float32)
        yield from loss_records(family, shape, half, gradient=False)
