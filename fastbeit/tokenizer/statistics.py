"""What the tokens of a set of images are like: use of the codebook, and what position tells.

Legend: n images, T tokens an image, V codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStatistics(NamedTuple):
    """Plug-in estimates over all tokens given.

    Attributes:
        codes_used: codes that occur.
        perplexity: exp of the entropy of the codes, positions mixed.
        positional_entropy_nats: mean over positions of the entropy of the code there: the loss of
            a guesser that knows only the position.
        best_position_guess: share of tokens hit by each position's commonest code, 0 to 1.
    """

    codes_used: int
    perplexity: float
    positional_entropy_nats: float
    best_position_guess: float


def token_statistics(codes_nT: Tensor, vocab_size: int) -> TokenStatistics:
    """Statistics of int64 codes [n, T] in [0, V)."""
    if codes_nT.ndim != 2 or codes_nT.numel() == 0:
        raise ValueError(f"codes must be [images, tokens], not empty, got {list(codes_nT.shape)}")
    tokens = codes_nT.shape[1]
    cells = codes_nT + vocab_size * torch.arange(tokens, device=codes_nT.device)
    counts_TV = torch.bincount(cells.flatten(), minlength=tokens * vocab_size)
    share_TV = counts_TV.view(tokens, vocab_size).double() / len(codes_nT)
    share_V = share_TV.mean(0)
    return TokenStatistics(
        codes_used=int((share_V > 0).sum()),
        perplexity=float(_entropy(share_V).exp()),
        positional_entropy_nats=float(_entropy(share_TV).mean()),
        best_position_guess=float(share_TV.amax(1).mean()),
    )


def _entropy(share: Tensor) -> Tensor:
    return -torch.special.xlogy(share, share).sum(-1)
