"""What a discrete VAE is trained on: a relaxed bound, its schedules, and care for dead codes.

The bound of DALL-E (arXiv 2102.12092, section 2.1 and appendix A.2) with the Gumbel-softmax
relaxation (arXiv 1611.01144). With logits l of a token, q = softmax(l), Gumbel noise g and
temperature tau, the decoder sees z = softmax((l + g) / tau), and the loss per sub-pixel is

    loss = R + beta * KL / (C * stride^2)
    KL   = mean over tokens of  log V - H(q)             (nats a token, to the uniform prior)
    R    = mean of  (x - mu)^2 / (2 sigma^2)              likelihood "mse", sigma = 0.1
    R    = mean of  log(2 b x (1 - x)) + |logit x - mu| / b    likelihood "logit-laplace"

Legend: B images, C colours, V codes, h, w tokens, E width of the decoder's code embeddings.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit.tokenizer.dvae import Decoder, Encoder

MSE_SIGMA = 0.1  # in mapped pixels: with the published mapping, an eighth of the black-white range


def cosine_between(start: float, end: float, step: int, steps: int) -> float:
    """``end + (start - end) (1 + cos(pi min(step / steps, 1))) / 2``; ``end`` when steps is 0."""
    progress = min(step / steps, 1.0) if steps > 0 else 1.0
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Bound(NamedTuple):
    """Terms of the loss, as device scalars, and what the batch looked like inside.

    ``loss`` and ``reconstruction`` in nats a sub-pixel, ``kl`` in nats a token;
    ``codes`` int64 [B, h, w]: the argmax, which the frozen tokenizer will give;
    ``features`` [B, D, h, w]: what the head read, detached.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    codes: Tensor
    features: Tensor


def relaxed_bound(
    encoder: Encoder,
    decoder: Decoder,
    images: Tensor,
    *,
    temperature: float,
    kl_weight: float,
    generator: torch.Generator,
) -> Bound:
    """The loss of mapped pixels [B, C, H, W]; differentiable in both networks."""
    config = encoder.config
    features_BDhw = encoder.features(images)
    logits_BVhw = encoder.head(features_BDhw)
    # -log of an Exp(1) draw is a Gumbel draw; the floor keeps the logarithm finite.
    noise = torch.empty_like(logits_BVhw).exponential_(generator=generator).clamp_(min=1e-20)
    relaxed_BVhw = F.softmax((logits_BVhw - noise.log()) / temperature, dim=1)
    reconstruction = negative_log_likelihood(decoder, decoder(relaxed_BVhw), images)
    log_q = F.log_softmax(logits_BVhw, dim=1)
    kl = math.log(config.codes) + (log_q.exp() * log_q).sum(1).mean()
    loss = reconstruction + kl_weight * kl / (config.channels * config.stride**2)
    codes_Bhw = logits_BVhw.detach().argmax(1)
    return Bound(loss, reconstruction.detach(), kl.detach(), codes_Bhw, features_BDhw.detach())


def negative_log_likelihood(decoder: Decoder, output: Tensor, images: Tensor) -> Tensor:
    """R of the module's docstring: a mean over sub-pixels, nats (up to a constant for "mse")."""
    mean = output[:, : decoder.config.channels]
    if decoder.config.likelihood == "mse":
        return (images - mean).square().mean() / (2 * MSE_SIGMA**2)
    # Bounded scale: without it a constant background drives b to zero and the loss to -infinity.
    log_b = output[:, decoder.config.channels :].clamp(-5.0, 5.0)
    inside = images.clamp(1e-3, 1 - 1e-3)
    density = (2 * inside * (1 - inside)).log() + log_b
    return (density + (inside.logit() - mean).abs() * (-log_b).exp()).mean()


class CodeUse:
    """How often each code is the argmax: a decaying count, from which dead codes are known.

    A count decays by ``1 - 1 / window_steps`` a step. A code is dead when its share of the counts
    is below ``dead_share / V``.

    Args:
        codes: V.
        window_steps: memory of the counts, in steps.
        dead_share: share of the fair share 1 / V below which a code is dead, in (0, 1).
    """

    def __init__(
        self, codes: int, window_steps: int, dead_share: float, device: torch.device | str = "cpu"
    ) -> None:
        self.codes = codes
        self.keep = 1.0 - 1.0 / max(window_steps, 1)
        self.dead_share = dead_share
        self.counts = torch.zeros(codes, dtype=torch.float64, device=device)

    def update(self, codes_Bhw: Tensor) -> None:
        """Counts one batch; no host sync."""
        seen = torch.zeros_like(self.counts)
        seen.scatter_add_(0, codes_Bhw.flatten(), torch.ones_like(codes_Bhw.flatten()).double())
        self.counts.mul_(self.keep).add_(seen)

    def threshold(self) -> Tensor:
        """The count below which a code is dead, a device scalar."""
        return self.dead_share / self.codes * self.counts.sum()

    def dead(self) -> Tensor:
        """bool [V]."""
        return self.counts < self.threshold()

    def used(self) -> int:
        """Codes that are not dead; host sync."""
        return int((~self.dead()).sum())

    def perplexity(self) -> float:
        """exp of the entropy of the counts: V when all codes are equally common; host sync."""
        share = self.counts / self.counts.sum().clamp(min=1e-30)
        return float(torch.exp(-torch.special.xlogy(share, share).sum()))


@torch.no_grad()
def revive_dead_codes(
    encoder: Encoder,
    decoder: Decoder,
    bound: Bound,
    use: CodeUse,
    optimizer: torch.optim.Optimizer,
    *,
    margin: float,
    generator: torch.Generator,
) -> int:
    """Gives every dead code a part of a live code's tokens; returns how many were dead. Host sync.

    A dead code never wins the argmax, and at a low temperature hardly gets a gradient. It restarts
    at a token f of the last batch, drawn with probability proportional to the squared distance of f
    from the mean m of the tokens that share its code k (k-means++ seeding: tight clusters, such as
    an even background, are not split). With e = (f - m) / |f - m|^2 the restarted logit is
        l_new(x) = l_k(x) + margin * e . (x - m),
    so half of k's tokens prefer the new code, f by ``margin`` nats. It inherits k's embedding, and
    its moments in the optimizer restart at zero.
    """
    dead = use.dead().nonzero().flatten()
    if len(dead) == 0:
        return 0
    rows_RD = bound.features.permute(0, 2, 3, 1).flatten(0, 2)
    codes_R = bound.codes.flatten()
    sums_VD = rows_RD.new_zeros(use.codes, rows_RD.shape[1]).index_add_(0, codes_R, rows_RD)
    sizes_V = torch.bincount(codes_R, minlength=use.codes).clamp(min=1)
    mean_RD = (sums_VD / sizes_V[:, None])[codes_R]
    distance_R = (rows_RD - mean_RD).square().sum(1)
    if not bool(distance_R.sum() > 0):
        return 0  # every cluster is a point: there is nothing to split
    picked = torch.multinomial(distance_R, len(dead), replacement=True, generator=generator)
    donor, centre = codes_R[picked], mean_RD[picked]
    direction = (rows_RD[picked] - centre) / distance_R[picked].clamp(min=1e-12)[:, None]
    head, embedding = encoder.head, decoder.embedding
    head.w[dead, :, 0, 0] = head.w[donor, :, 0, 0] + margin * direction
    head.b[dead] = head.b[donor] - margin * (direction * centre).sum(1)
    embedding.w[:, dead] = embedding.w[:, donor]
    for parameter, code_axis in ((head.w, 0), (head.b, 0), (embedding.w, 1)):
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state.get(parameter, {}):
                optimizer.state[parameter][moment].movedim(code_axis, 0)[dead] = 0
    # Just above the line: alive if it is used from now on, dead again within a window if not.
    use.counts[dead] = 2 * use.threshold()
    return len(dead)
