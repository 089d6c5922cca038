"""The chance lines: how well tokens are guessed by someone who sees only the position.

A masked-image model that has learned nothing but "the top left is usually background" already
scores far better than uniform guessing: on centred product photographs, a third of the tokens or
more. Two numbers say what such a position-only predictor reaches, and both are drawn beside the
training curves:

* loss: ``H(token | position) = sum_p w_p * H(token at p)`` in nats, ``w_p`` the share of masked
  slots that fall on position p. No position-only predictor has a lower expected cross-entropy.
* accuracy: ``sum_p w_p * max_v P(token v at p)``, always guessing the position's commonest token.

Both are plug-in estimates from the tokens seen so far, so they are fitted in hindsight to the very
sample they are scored on. With few slots per position the entropy comes out too low (by about
``(codes - 1) / (2 n)`` nats with n slots at a position and that many codes in use there: Miller,
1955) and the accuracy too high. Either way the line is stricter than the truth, and tightens as
slots accumulate: a model that passes it has passed it.

Shapes: B images, M mask slots, N patches, V codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class ChanceLines(NamedTuple):
    """What position alone predicts, and how the codebook is used; NaN before the first slot.

    Attributes:
        loss_nats: entropy of the token given its position, plug-in: the strict chance loss.
        accuracy: share of slots guessed by each position's commonest token, 0 to 1.
        entropy_nats: entropy of the token with the position unknown.
        codes_used: number of codes seen at least once.
        perplexity: ``exp(entropy_nats)``: the number of equally common codes that would have this
            entropy.
        slots: number of masked slots behind these estimates.
    """

    loss_nats: float
    accuracy: float
    entropy_nats: float
    codes_used: int
    perplexity: float
    slots: int


class PositionalStats:
    """Histogram [N, V] of target tokens by position, kept on the device without host syncs.

    ``update`` runs every step on every rank. ``fold`` sums over ranks (a collective, so all ranks
    call it together); ``measure`` folds and reads the result back, the one host sync here. The
    folded histogram is the same on every rank: it goes into a checkpoint as it is, and loads back
    on any number of ranks.
    """

    def __init__(
        self, num_patches: int, vocab_size: int, device: torch.device | str = "cpu"
    ) -> None:
        if num_patches < 1 or vocab_size < 1:
            raise ValueError(
                "num_patches and vocab_size must be positive, got "
                f"{num_patches} and {vocab_size}: pass the model's patch count and the "
                "tokenizer's vocab_size"
            )
        self.num_patches = num_patches
        self.vocab_size = vocab_size
        cells = num_patches * vocab_size
        # int64 on purpose: float32 stops counting at 2**24 slots, one epoch of a small run.
        self._folded = torch.zeros(cells, dtype=torch.int64, device=device)
        # Two more cells: empty slots, and tokens or positions outside the histogram.
        self._local = torch.zeros(cells + 2, dtype=torch.int64, device=device)
        self._outside = torch.zeros((), dtype=torch.int64, device=device)
        self._pending = False

    def update(self, targets: Tensor, positions: Tensor) -> None:
        """Counts one batch; asynchronous, static shapes.

        Args:
            targets: ``[B, M]`` int64 token numbers; negative ones are not counted.
            positions: ``[B, M]`` int patch numbers; empty slots -1 are not counted.
        """
        if targets.shape != positions.shape:
            raise ValueError(
                f"targets and positions must have one shape [B, M], got {list(targets.shape)} "
                f"and {list(positions.shape)}: encode the tokens at the masked positions only"
            )
        positions = positions.long()
        empty = (positions < 0) | (targets < 0)
        outside = (positions >= self.num_patches) | (targets >= self.vocab_size)
        cell = positions * self.vocab_size + targets
        cells = self.num_patches * self.vocab_size
        cell = cell.masked_fill(outside, cells + 1).masked_fill(empty, cells).flatten()
        self._local.scatter_add_(0, cell, torch.ones_like(cell))
        self._pending = True

    def fold(self, group: dist.ProcessGroup | None = None) -> None:
        """Adds the counts of all ranks since the last fold to the common histogram.

        A collective when ``torch.distributed`` is initialised: every rank of ``group`` calls it.
        """
        if _world_size(group) > 1:
            dist.all_reduce(self._local, group=group)
        self._folded += self._local[:-2]
        self._outside += self._local[-1]
        self._local.zero_()
        self._pending = False

    def measure(self, group: dist.ProcessGroup | None = None) -> ChanceLines:
        """Folds over ranks and returns the chance lines; host sync.

        Raises:
            ValueError: a token or position lay outside the histogram (wrong vocab_size or grid).
        """
        self.fold(group)
        counts_NV = self._folded.view(self.num_patches, self.vocab_size).double()
        position_N, code_V = counts_NV.sum(1), counts_NV.sum(0)
        slots = position_N.sum()
        # sum_p w_p H_p, with H_p = log n_p - sum_v c_pv log c_pv / n_p and w_p = n_p / n.
        conditional = (_xlogx(position_N).sum() - _xlogx(counts_NV).sum()) / slots
        unconditional = (_xlogx(slots) - _xlogx(code_V).sum()) / slots
        accuracy = counts_NV.amax(1).sum() / slots
        values = torch.stack(
            [
                conditional,
                accuracy,
                unconditional,
                (code_V > 0).sum().double(),
                slots,
                self._outside.double(),
            ]
        )
        loss, best, entropy, used, count, wrong = values.tolist()  # host sync: once a log interval
        if wrong:
            raise ValueError(
                f"{int(wrong)} target tokens lay outside the histogram of {self.num_patches} "
                f"positions x {self.vocab_size} codes: the tokenizer's vocabulary or the patch "
                "grid is not the one these statistics were made for"
            )
        perplexity = torch.tensor(entropy).exp().item()
        return ChanceLines(
            max(loss, 0.0), best, max(entropy, 0.0), int(used), perplexity, int(count)
        )

    @property
    def tensor(self) -> Tensor:
        """``[N, V]`` int64 counts over all ranks, for a checkpoint; a view, not a copy.

        With several ranks call ``fold`` first: a property can't be a collective.
        """
        if self._pending:
            if _world_size(None) > 1:
                raise RuntimeError(
                    "counts of other ranks are missing: call fold() on every rank, then read tensor"
                )
            self.fold()
        return self._folded.view(self.num_patches, self.vocab_size)

    def load(self, counts: Tensor) -> None:
        """Replaces all counts by a checkpoint's ``tensor`` ``[N, V]``, the same on every rank."""
        expected = (self.num_patches, self.vocab_size)
        if tuple(counts.shape) != expected:
            raise ValueError(
                f"expected counts of shape {list(expected)}, got {list(counts.shape)}: "
                "the checkpoint was made with another patch grid or codebook"
            )
        self._folded.copy_(counts.reshape(-1))
        self._local.zero_()
        self._pending = False


def _xlogx(counts: Tensor) -> Tensor:
    return torch.special.xlogy(counts, counts)


def _world_size(group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)
