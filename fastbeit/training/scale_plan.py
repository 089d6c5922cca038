"""The table of ``--plan`` for many GPUs: step time, images/s and what binds, by sharding mode.

A model and no measurement: ``scale.py`` counts what is sent, ``scale_time.py`` says how long that
takes beside the arithmetic, and ``scale_assumptions.py`` holds every number in use. docs/scale.md
has the formulas and what of them was checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastbeit.tokenizer.dvae import DvaeConfig
from fastbeit.training import layout
from fastbeit.training.config import PretrainConfig
from fastbeit.training.cost import count_parameters, student_flops, tokenizer_flops
from fastbeit.training.memory import checkpoint_bytes
from fastbeit.training.peak import peak_flops
from fastbeit.training.scale import MODES, Mode, groups, model_units, traffic
from fastbeit.training.scale_assumptions import Assumptions
from fastbeit.training.scale_time import Compute, GpuTime, gpu_time, nccl_seconds

GPU_COUNTS = (8, 64, 512)


class StepTime(NamedTuple):
    """One optimizer step, in seconds."""

    gpu: GpuTime
    launches: float
    """Of the arithmetic's time, what only the start of kernels takes: few images a GPU."""
    loader: float
    storage: float
    checkpoint: float
    """A step's share of the time for which checkpoints hold it up."""
    sent: float
    """Bytes that a rank sends."""

    @property
    def seconds(self) -> float:
        """Loading runs beside the GPU; a checkpoint's copy to the host does not."""
        return max(self.gpu.seconds, self.loader, self.storage) + self.checkpoint

    @property
    def binds(self) -> str:
        """What is busy for longest."""
        busy = {
            "compute": self.gpu.compute - self.launches,
            "launches": self.launches and self.gpu.compute,
            "intra-node link": self.gpu.intra,
            "network": self.gpu.network,
            "loader": self.loader,
            "storage": self.storage,
            "checkpoints": self.checkpoint,
        }
        return max(busy, key=lambda name: busy[name])


class ScaleRow(NamedTuple):
    """One line of the table."""

    gpus: int
    mode: Mode
    images_a_gpu: int
    step: StepTime
    images_per_s: float
    efficiency: float
    """Images/s a GPU, over those of one GPU alone that accumulates the whole batch."""


def compute_of(
    config: PretrainConfig,
    dvae: DvaeConfig,
    images: int,
    device: str,
    numbers: Assumptions,
    images_per_s: float | None = None,
) -> Compute:
    """Arithmetic of a micro-batch of ``images`` on one GPU called ``device``.

    Args:
        images_per_s: measured on one GPU; None: the assumed share of the device's peak.
    """
    # "auto" means 16 bits on a GPU, unless the images' tokens don't bear it.
    tokenizer_precision = "fp32" if config.tokenizer.tokenizer_precision == "fp32" else "bf16"
    precision = "fp32" if config.run.precision == "fp32" else "bf16"
    student_peak = peak_flops(device, precision).flops_per_s
    tokenizer_peak = peak_flops(device, tokenizer_precision).flops_per_s
    assert student_peak is not None and tokenizer_peak is not None
    model, slots = config.model, config.mask.target
    whole = student_flops(model, slots)
    one = student_flops(replace(model, depth=1), slots)
    last = one.block_linears + one.attention  # the pruned one
    others = whole.block_linears + whole.attention - last
    rate = numbers.peak_share * student_peak
    blocks = [others / max(1, model.depth - 1)] * (model.depth - 1) + [last]
    tokens = tokenizer_flops(dvae, model.grid, slots).total
    stored = count_parameters(model).stored
    compute = Compute(
        tokenizer=images * tokens / (numbers.peak_share * tokenizer_peak),
        embedding=images * whole.patch_embedding / rate,
        blocks=tuple(images * block / rate for block in blocks),
        head=images * whole.head / rate,
        update=stored * numbers.adamw_bytes / (numbers.hbm_gb_s * 1e9),
    )
    if images_per_s is None:
        return compute
    # The rate was measured with AdamW's update in it, once a micro-batch.
    measured_s = max(images / images_per_s - compute.update, 0.5 * images / images_per_s)
    return compute.scaled(measured_s / compute.micro_batch)


def step_time(
    config: PretrainConfig,
    dvae: DvaeConfig,
    mode: Mode,
    gpus: int,
    *,
    device: str,
    numbers: Assumptions,
    images_per_s: float | None = None,
) -> StepTime:
    """One step of ``config``'s global batch on ``gpus`` GPUs.

    Raises:
        ValueError: the batch can't be cut for them, or hybrid on nodes that are not full.
    """
    per_node = int(numbers.gpus_per_node)
    cut = layout.resolve_batch(config, gpus)
    units = model_units(config.model, config.run.precision)
    sends = traffic(units, mode, gpus, per_node)
    shards = groups(mode, gpus, per_node)[0].ranks
    pure = compute_of(config, dvae, cut.micro_batch, device, numbers, images_per_s)
    compute = pure.scaled(max(1.0, numbers.launch_ms / 1e3 / pure.micro_batch))
    gpu = gpu_time(
        compute,
        sends,
        lambda call: nccl_seconds(call, numbers),
        accumulation=cut.accumulation,
        shards=shards,
        slowdown=numbers.overlap_slowdown,
    )
    nodes = math.ceil(gpus / per_node)
    read_gb_s = min(nodes * numbers.storage_node_gb_s, numbers.storage_gb_s)
    step = StepTime(
        gpu,
        launches=cut.accumulation * (compute.micro_batch - pure.micro_batch),
        loader=cut.accumulation * cut.micro_batch / numbers.loader_images_s,
        storage=config.run.global_batch * numbers.image_kb * 1e3 / (read_gb_s * 1e9),
        checkpoint=0.0,
        sent=sends.sent(cut.accumulation),
    )
    # The copy to the host holds training up; writing only where the next save comes before its end.
    saved = checkpoint_bytes(config.model)
    copying = saved / shards / (numbers.host_copy_gb_s * 1e9)
    writing = saved / (numbers.checkpoint_gb_s * 1e9)
    waiting = max(0.0, writing - config.run.checkpoint_every * step.seconds)
    return step._replace(checkpoint=(copying + waiting) / config.run.checkpoint_every)


def scale_rows(
    config: PretrainConfig,
    dvae: DvaeConfig,
    gpus: int,
    *,
    device: str,
    numbers: Assumptions,
    images_per_s: float | None = None,
) -> Iterator[ScaleRow | str]:
    """Rows for 8, 64, 512 and ``gpus`` GPUs; a text where the batch can't be cut for so many."""

    def step(mode: Mode, count: int) -> StepTime:
        return step_time(
            config, dvae, mode, count, device=device, numbers=numbers, images_per_s=images_per_s
        )

    batch = config.run.global_batch
    alone = batch / step("none", 1).seconds
    for count in sorted({*GPU_COUNTS, max(gpus, GPU_COUNTS[0])}):
        for mode in MODES:
            if mode == "hybrid" and count <= numbers.gpus_per_node:
                continue  # inside one node it is zero3
            try:
                found = step(mode, count)
            except ValueError as error:
                yield f"{count} GPUs: {str(error).partition(':')[0]}"
                break
            rate = batch / found.seconds
            yield ScaleRow(count, mode, batch // count, found, rate, rate / count / alone)


def scale_table(
    config: PretrainConfig,
    dvae: DvaeConfig,
    gpus: int,
    *,
    device: str,
    numbers: Assumptions,
    images_per_s: float | None = None,
) -> RenderableType:
    """:func:`scale_rows`, to print."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("--shard", no_wrap=True)
    for name in ("GPUs", "images each", "step ms", "exposed", "images/s", "efficiency", "GB sent"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("busiest", no_wrap=True)
    notes = []
    for row in scale_rows(
        config, dvae, gpus, device=device, numbers=numbers, images_per_s=images_per_s
    ):
        if isinstance(row, str):
            notes.append(f"{row}.")
            continue
        if row.mode == MODES[0]:
            table.add_section()
        table.add_row(
            row.mode,
            f"{row.gpus:,}",
            f"{row.images_a_gpu:,}",
            f"{1e3 * row.step.seconds:.1f}",
            f"{1e3 * row.step.gpu.exposed:.1f}",
            f"{row.images_per_s:,.0f}",
            f"{row.efficiency:.0%}",
            f"{row.step.sent / 1e9:.2f}",
            row.step.binds,
        )
    if images_per_s is None:
        image = compute_of(config, dvae, 1, device, numbers)
        rate = (
            f"{1 / image.micro_batch:,.0f} images/s, {numbers.peak_share:.0%} of an {device}'s "
            f"peak, which is assumed (give --images-per-s); the tokenizer, in "
            f"{'fp32' if config.tokenizer.tokenizer_precision == 'fp32' else '16 bits'}, takes "
            f"{image.tokenizer / image.micro_batch:.0%} of it"
        )
    else:
        rate = f"{images_per_s:g} images/s, as --images-per-s says"
    notes.append(
        f"Arithmetic on one GPU: {rate}. GB sent: by a rank in a step. Formulas, assumptions and "
        "what was checked: docs/scale.md; --scale-assumptions FILE gives other numbers."
    )
    title = "Many GPUs, the same global batch: a model, nothing of it measured"
    return Group(Text(title, style="bold"), table, Text("\n".join(notes), style="dim"))
