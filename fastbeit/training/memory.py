"""Estimated memory of a rank, and the bytes of a checkpoint.

Weights, gradients and optimizer state follow from FSDP2 as ``distributed.py`` applies it.
Activations are what autograd keeps of ``fastbeit/model`` between forward and backward, tensor by
tensor, as written in :func:`activation_bytes`. Left out are buffers of a moment (a gradient on its
way to its reduction), the allocator's rounding, libraries' workspaces and the loader's batches.
"""

from __future__ import annotations

from typing import NamedTuple

from fastbeit.model import BeitConfig
from fastbeit.tokenizer.dvae import DvaeConfig
from fastbeit.training.config import PretrainConfig
from fastbeit.training.cost import block_parameters, count_parameters
from fastbeit.training.distributed import BLOCKS_PER_UNIT

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "auto": 4}  # a tokenizer's auto at its worst


class RankMemory(NamedTuple):
    """Bytes on one rank."""

    master_weights: int
    gradients: int
    optimizer_state: int
    gathered_weights: int
    """Copies in the student's precision that the arithmetic reads."""
    activations: int
    loss_head: int
    """Logits and their gradient, which live together for a moment."""
    tokenizer_weights: int
    tokenizer_activations: int
    """Free again before the student's forward pass, unless they run beside it."""
    beside: bool = False
    """Whether tokens are made while the student trains, or graphs keep its memory to themselves."""

    @property
    def peak(self) -> int:
        """What is held at once at the worst moment, by these figures."""
        lasting = (
            self.master_weights
            + self.gradients
            + self.optimizer_state
            + self.gathered_weights
            + self.tokenizer_weights
        )
        passing = (self.activations + self.loss_head, self.tokenizer_activations)
        return lasting + (sum(passing) if self.beside else max(passing))


def checkpoint_bytes(model: BeitConfig) -> int:
    """One checkpoint: fp32 weights and AdamW's two moments of each."""
    return 12 * count_parameters(model).stored


def rank_memory(
    config: PretrainConfig,
    dvae: DvaeConfig,
    micro_batch: int,
    *,
    world_size: int,
    local_size: int,
    fused_attention: bool,
    checkpointing: bool = False,
    beside: bool = False,
) -> RankMemory:
    """Estimated bytes on one of ``world_size`` ranks, ``local_size`` of them on a node.

    Args:
        checkpointing: blocks keep their inputs only and are computed again in the backward pass.
        beside: the tokenizer runs beside the student, or one of them in a CUDA graph.
        fused_attention: attention keeps no probabilities (PyTorch's fused kernels, on a GPU); False
            is the plain formula, which a CPU runs where the bias is trained or in bf16.
    """
    model, run = config.model, config.run
    stored = count_parameters(model).stored
    match run.shard:
        case "none":
            shards = 1
        case "zero2" | "zero3":
            shards = world_size
        case "hybrid":
            shards = local_size
    item = ITEM_BYTES[run.precision]
    block = block_parameters(model) + model.width
    gathered = stored
    if world_size == 1 and item == 4:
        gathered = 0  # one device computes with the masters themselves
    elif world_size > 1 and run.shard in ("zero3", "hybrid"):
        # The root (embedding, norm, head) stays; one unit of blocks works while the next comes.
        units_blocks = min(model.depth, 2 * BLOCKS_PER_UNIT)
        gathered = stored - (model.depth - units_blocks) * block
    own = -(-stored // shards)
    tokenizer_item = ITEM_BYTES[config.tokenizer.tokenizer_precision]
    return RankMemory(
        master_weights=4 * own,
        gradients=4 * own,
        optimizer_state=8 * own,
        gathered_weights=item * gathered,
        activations=micro_batch
        * activation_bytes(config, fused_attention=fused_attention, checkpointing=checkpointing),
        loss_head=micro_batch * config.mask.target * model.vocab_size * (item + 4 + 4),
        tokenizer_weights=tokenizer_item * encoder_numbers(dvae),
        tokenizer_activations=micro_batch * tokenizer_item * _encoder_numbers_held(dvae, model),
        beside=beside,
    )


def activation_bytes(
    config: PretrainConfig, *, fused_attention: bool, checkpointing: bool = False
) -> int:
    """Bytes that autograd keeps of one image until the backward pass, the loss head left out.

    In widths D a token, of a block: norm 1's input and output (2), queries, keys, values (3), the
    attention's output (1), the MLP's hidden layer before and after GELU (2 x mlp_ratio), norm 2's
    input and output (2); and both branches (2) where LayerScale or DropPath multiplies them. The
    last block keeps most of that for the mask slots only. Plain attention adds its probabilities,
    in fp32 and in the student's precision. Under checkpointing a block keeps what it is given, the
    residual stream and the branch before it, and one block at a time all the rest.
    """
    model, slots = config.model, config.mask.target
    item = ITEM_BYTES[config.run.precision]
    tokens, width, hidden = model.tokens, model.width, model.mlp_width
    branches = 2 * width if model.layer_scale is not None or model.drop_path > 0.0 else 0
    full = tokens * (8 * width + 2 * hidden + branches)
    # All tokens: norm 1's input and output, keys, values. Slots: the gathered normed rows, the
    # queries before and after emptying, attention's output likewise, norm 2's input and output.
    last = tokens * 4 * width + slots * (7 * width + 2 * hidden + branches)
    # Blocks that keep all of it: every one, or the one that is being computed again.
    whole = 1 if checkpointing else model.depth - 1
    kept = (whole * full + (0 if checkpointing else last)) * item
    if checkpointing:
        # The first block has no branch before it; the last one's goes to the last norm.
        kept += ((2 * model.depth - 1) * tokens + slots) * width * item
    rows = whole * tokens + (0 if checkpointing else slots)
    if fused_attention:
        kept += model.heads * rows * 4  # a log-sum-exp a row
    else:
        copies = 4 if item == 4 else 4 + item
        kept += rows * model.heads * tokens * copies
    image = model.in_channels * model.image_hw[0] * model.image_hw[1]
    return kept + (image + slots * 2 * width) * item


FITS = 0.9
"""Share of a device's memory that the estimate may fill: what it leaves out needs the rest."""


def choose_checkpointing(
    asked: str, plain: RankMemory, memory_bytes: int | None
) -> tuple[bool, str]:
    """Whether blocks are computed again in the backward pass instead of kept, and why.

    Args:
        asked: ``--activation-checkpointing``.
        plain: the estimate without it.
        memory_bytes: the device's, this rank's share of it; None where unknown.
    """
    if asked != "auto":
        return asked == "on", "asked for by name"
    if memory_bytes is None:
        return False, "the device's memory is not known"
    share = f"an estimated {plain.peak / 1e9:.1f} GB of {memory_bytes / 1e9:.1f} GB without it"
    return plain.peak > FITS * memory_bytes, share


def encoder_numbers(dvae: DvaeConfig) -> int:
    """Parameters of a discrete VAE's encoder."""
    total = dvae.kernel**2 * dvae.channels * dvae.widths[0] + dvae.widths[0]
    inputs = dvae.widths[0]
    for width in dvae.widths:
        hidden = width // 4
        for _ in range(dvae.blocks_per_group):
            total += (
                9 * inputs * hidden + 18 * hidden * hidden + hidden * width + 3 * hidden + width
            )
            if inputs != width:
                total += inputs * width + width
            inputs = width
    return total + dvae.widths[-1] * dvae.codes + dvae.codes


def _encoder_numbers_held(dvae: DvaeConfig, model: BeitConfig) -> int:
    """Numbers an image that the encoder holds at its largest: input, branch and sum of a block of
    the first group, at full resolution."""
    return 3 * model.patches * dvae.stride**2 * dvae.widths[0]
