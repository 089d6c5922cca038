"""The configuration of a pre-training run: frozen dataclasses, one a concern.

A recipe (``fastbeit/recipes/``) returns a :class:`PretrainConfig`; flags change single fields
(``fastbeit/cli.py``); the resolved result is written to ``config.json`` in the run folder and read
back by ``--config`` (``config_io.py``). :meth:`PretrainConfig.validate` refuses what cannot work
before anything is loaded (``validation.py``).

The string under a field is its help text, and its metavar in the help is its unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from fastbeit.data import MaskSpec, PlanSpec
from fastbeit.data.backend import HW_DECODER_LOAD
from fastbeit.data.header import DEFAULT_MAX_PIXELS
from fastbeit.flags import OmitArgPrefixes, Suppress, arg
from fastbeit.model import BeitConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class MaskConfig:
    """Which patches are hidden (the grid is the model's)."""

    strategy: Literal["block", "random"] = "block"
    """block: blockwise masking of the BEiT paper; random: its ablation."""
    target: Annotated[int, arg(metavar="PATCHES")] = 75
    """Patches to mask in an image; blockwise masking may fall a few short of it."""
    min_block: Annotated[int, arg(metavar="PATCHES")] = 16
    """Smallest area proposed for a block, in patches."""


@dataclass(frozen=True)
class DataConfig:
    """Images, their augmentation, and the loader."""

    data: Annotated[str, arg(metavar="PATH")] = ""
    """Folder (searched recursively), list file, tar shards (a path, glob or {000..146} pattern).
    "demo": the images that come with the package."""
    loader: Literal["auto", "dali", "reference"] = "auto"
    """Who decodes: auto takes DALI on a GPU, elsewhere what measured faster, and says which."""
    workers: Annotated[int | None, arg(metavar="COUNT")] = None
    """Decoding processes (reference) or threads (dali) per rank; none: chosen from the cores."""
    prefetch: Annotated[int, arg(metavar="BATCHES")] = 2
    """Batches prepared ahead, per worker."""
    hw_decoder_load: Annotated[float, arg(metavar="SHARE")] = HW_DECODER_LOAD
    """Share of the JPEGs for the GPU's hardware decoder, where it has one (dali); the best one
    depends on GPU, workers and images: python -m fastbeit.data.tune finds it."""
    crop_scale: Annotated[tuple[float, float], arg(metavar="MIN_SHARE MAX_SHARE")] = (0.08, 1.0)
    """Area of the random crop, as a share of the image's."""
    crop_ratio: Annotated[tuple[float, float], arg(metavar="MIN_RATIO MAX_RATIO")] = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
    flip: Annotated[float, arg(metavar="PROBABILITY")] = 0.5
    """Probability of a horizontal flip."""
    jitter: Annotated[tuple[float, float, float], arg(metavar="BRIGHTNESS CONTRAST SATURATION")] = (
        0.4,
        0.4,
        0.4,
    )
    """Strength of brightness, contrast and saturation jitter; 0 is off."""
    mean: Annotated[tuple[float, ...], arg(metavar="VALUE ...")] = IMAGENET_MEAN
    """Per-channel mean that the student's images are normalised with, on a 0-1 scale."""
    std: Annotated[tuple[float, ...], arg(metavar="VALUE ...")] = IMAGENET_STD
    """Per-channel standard deviation, likewise."""
    max_bad_fraction: Annotated[float, arg(metavar="SHARE")] = 0.01
    """Share of bad images (unreadable, truncated) above which the run stops and lists them."""
    max_pixels: Annotated[int, arg(metavar="PIXELS")] = DEFAULT_MAX_PIXELS
    """Images whose header claims more pixels are refused before decoding."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the visual tokens come from."""

    tokenizer: Annotated[str, arg(metavar="NAME|PATH")] = "dall-e"
    """dall-e, demo, or the path of a tokenizer's safetensors file."""
    tokenizer_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the frozen tokenizer; auto: 16 bits where the device is faster with them and
    they keep 99 % of fp32's tokens on the run's first images (the better format), else fp32."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and the gradient clip."""

    optimizer: Literal["adamw", "apex"] = "adamw"
    """adamw: PyTorch's fused AdamW; apex: FusedAdam of NVIDIA's apex, an error where absent."""
    lr: Annotated[float, arg(metavar="RATE")] = 1.5e-3
    """Peak learning rate at the recipe's global batch (never rescaled silently)."""
    min_lr: Annotated[float, arg(metavar="RATE")] = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_epochs: Annotated[float, arg(metavar="EPOCHS")] = 10.0
    """Linear warm-up from 0, in epochs; ignored where warmup_steps is given."""
    warmup_steps: Annotated[int | None, arg(metavar="STEPS")] = None
    """Linear warm-up from 0, in optimizer steps."""
    weight_decay: Annotated[float, arg(metavar="RATE")] = 0.05
    """Decoupled weight decay (none on biases, norms, LayerScale, CLS and positions)."""
    betas: Annotated[tuple[float, float], arg(metavar="BETA1 BETA2")] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, arg(metavar="VALUE")] = 1e-8
    """AdamW's epsilon, added to the root of the second moment."""
    clip_norm: Annotated[float, arg(metavar="NORM")] = 3.0
    """Global gradient norm to clip to; 0 is off."""


@dataclass(frozen=True)
class RunConfig:
    """Length, hardware, logging and saving."""

    run_dir: Annotated[Path | None, arg(metavar="DIR")] = None
    """Run folder; runs/RECIPE when not given. The same command in the same folder resumes."""
    epochs: Annotated[float, arg(metavar="EPOCHS")] = 800.0
    """Length of the run in passes over the data; ignored where steps is given."""
    steps: Annotated[int | None, arg(metavar="STEPS")] = None
    """Length of the run in optimizer steps, instead of epochs."""
    stop_after: Annotated[int | None, arg(metavar="STEPS")] = None
    """Stop (saving first) once the run is at this step, leaving the schedule as it is."""
    global_batch: Annotated[int, arg(metavar="IMAGES")] = 2048
    """Images an optimizer step, over all ranks and accumulation steps."""
    micro_batch: Annotated[int | None, arg(metavar="IMAGES")] = None
    """Images a rank takes at once (none: its share, up to 128); accumulation fills the rest."""
    seed: Annotated[int, arg(metavar="NUMBER")] = 0
    """Every random decision follows from it: weights, order, crops, masks, DropPath."""
    precision: Literal["bf16", "fp32", "auto"] = "bf16"
    """Arithmetic of the student; auto: bf16 where the hardware multiplies it, else fp32. The master
    weights, the reduction and AdamW are fp32 always."""
    shard: Literal["none", "zero2", "zero3", "hybrid"] = "none"
    """What FSDP2 splits over ranks. zero2: gradients and optimizer state, zero3: parameters too.
    hybrid: as zero3 inside a node, with copies across nodes."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run; auto takes the GPU where there is one."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Who computes the operations of model and tokenizer: auto takes those Triton kernels that a
    GPU has shown right and faster, PyTorch for the others; triton is an error where it can't."""
    attention: Literal["auto", "triton", "sdpa", "flex", "xformers", "reference"] = "auto"
    """Who computes attention; auto: as --kernels. What can't run here is an error."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each block with torch.compile; auto: where the run repays it, and says why."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute blocks again in the backward pass instead of keeping what is inside them: a third
    more arithmetic. auto: where they don't fit the memory, by the estimate that --plan prints."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the step, and the tokenizer where it runs ahead, as CUDA graphs; on one GPU."""
    tokenize_ahead: Literal["auto", "on", "off"] = "auto"
    """Make the tokens of the next batch on a stream of their own while this one trains; on GPUs."""
    log_every: Annotated[int, arg(metavar="STEPS")] = 50
    """Steps between two log lines; reading the numbers waits for the device."""
    checkpoint_every: Annotated[int, arg(metavar="STEPS")] = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: Annotated[int, arg(metavar="COUNT")] = 2
    """Checkpoints kept, the newest ones."""
    nonfinite_limit: Annotated[int, arg(metavar="STEPS")] = 10
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    allow_config_change: bool = False
    """Resume although the configuration differs from the run folder's."""
    evaluate: bool = True
    """At the end, probe the encoder where the data has labels and splits (the demo has)."""
    stall_minutes: Annotated[float, arg(metavar="MINUTES")] = 20.0
    """Minutes without a finished step after which a rank reports itself stalled and exits."""
    tensorboard: bool = False
    """Also write TensorBoard events (pip install "fastbeit[tracking]")."""
    wandb: bool = False
    """Also log to Weights & Biases (pip install "fastbeit[tracking]")."""


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that determines a pre-training run."""

    recipe: Suppress[str] = "custom"
    data: OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    run: OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    optimizer: OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    tokenizer: OmitArgPrefixes[TokenizerConfig] = field(default_factory=TokenizerConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    model: BeitConfig = field(default_factory=BeitConfig)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.run.run_dir or Path("runs") / self.recipe

    def mask_spec(self) -> MaskSpec:
        """How masks are drawn on the model's grid."""
        return MaskSpec(
            grid=self.model.grid,
            target=self.mask.target,
            min_block=self.mask.min_block,
            strategy=self.mask.strategy,
        )

    def plan_spec(self) -> PlanSpec:
        """What is drawn at random for every sample."""
        return PlanSpec(
            mask=self.mask_spec(),
            crop_scale=self.data.crop_scale,
            crop_ratio=self.data.crop_ratio,
            flip=self.data.flip,
            jitter=self.data.jitter,
            drop_path=self.model.drop_path,
            depth=self.model.depth,
        )

    def validate(self, *, need_data: bool = True) -> None:
        """Refuses what cannot work, every problem with its remedy.

        Args:
            need_data: also refuse a configuration that names no images (``--plan`` needs none).

        Raises:
            ValueError: one line a problem.
        """
        from fastbeit.training.validation import problems

        found = problems(self, need_data=need_data)
        if found:
            raise ValueError("\n".join(found))
