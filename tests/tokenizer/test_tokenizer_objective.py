"""The relaxed bound, its schedules, and the revival of dead codes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import AffineTransform, Laplace, SigmoidTransform, TransformedDistribution

from fastbeit.tokenizer import DvaeConfig
from fastbeit.tokenizer.dvae import Decoder, Encoder, initialise
from fastbeit.tokenizer.objective import (
    MSE_SIGMA,
    CodeUse,
    cosine_between,
    negative_log_likelihood,
    relaxed_bound,
    revive_dead_codes,
)
from fastbeit.tokenizer.statistics import token_statistics


def networks(likelihood="mse", codes=24, seed=0):
    config = DvaeConfig(
        channels=1, codes=codes, widths=(8, 16), code_width=8, likelihood=likelihood
    )
    pair = Encoder(config), Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    for network in pair:
        initialise(network, generator)
    return pair


def images(count=6, seed=1):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1


def test_cosine_schedule():
    assert cosine_between(1.0, 0.0625, 0, 100) == 1.0
    assert cosine_between(1.0, 0.0625, 50, 100) == pytest.approx((1 + 0.0625) / 2)
    assert cosine_between(0.0, 2.0, 25, 100) == pytest.approx(2 * (1 - math.cos(math.pi / 4)) / 2)
    assert cosine_between(1.0, 0.0625, 100, 100) == cosine_between(1.0, 0.0625, 999, 100) == 0.0625
    assert cosine_between(1.0, 0.5, 0, 0) == 0.5


def test_mse_is_a_gaussian_likelihood_up_to_a_constant():
    decoder = networks("mse")[1]
    mean, x = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
    density = torch.distributions.Normal(mean, MSE_SIGMA).log_prob(x)
    constant = math.log(MSE_SIGMA * math.sqrt(2 * math.pi))
    expected = -density.mean() - constant
    torch.testing.assert_close(negative_log_likelihood(decoder, mean, x), expected)


def test_logit_laplace_equals_the_distribution():
    decoder = networks("logit-laplace")[1]
    mean, log_b = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    x = torch.rand(2, 1, 4, 4) * 0.8 + 0.1
    transforms = [AffineTransform(0.0, 1.0), SigmoidTransform()]
    distribution = TransformedDistribution(Laplace(mean, log_b.exp()), transforms)
    loss = negative_log_likelihood(decoder, torch.cat([mean, log_b], 1), x)
    torch.testing.assert_close(loss, -distribution.log_prob(x).mean(), rtol=1e-5, atol=1e-5)


def bound(pair, x, **changes):
    settings = {"temperature": 1.0, "kl_weight": 0.0} | changes
    return relaxed_bound(*pair, x, generator=torch.Generator().manual_seed(3), **settings)


def test_kl_is_zero_for_uniform_and_log_v_for_certain_codes():
    pair = networks()
    with torch.no_grad():
        pair[0].head.w.zero_()
        pair[0].head.b.zero_()
    assert float(bound(pair, images()).kl) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        pair[0].head.b[5] = 100.0
    certain = bound(pair, images())
    assert float(certain.kl) == pytest.approx(math.log(24))
    assert bool((certain.codes == 5).all())


def test_kl_is_weighted_per_sub_pixel():
    pair = networks()
    plain, weighted = bound(pair, images()), bound(pair, images(), kl_weight=0.7)
    expected = plain.loss + 0.7 * plain.kl / (1 * 2 * 2)
    torch.testing.assert_close(weighted.loss, expected, rtol=1e-5, atol=0)


def test_noise_is_gumbel_and_a_low_temperature_samples_from_q():
    pair = networks()
    probabilities = torch.linspace(1, 5, 24) / torch.linspace(1, 5, 24).sum()
    with torch.no_grad():
        pair[0].head.w.zero_()
        pair[0].head.b.copy_(probabilities.log())
    seen = []
    pair[1].blocks["input"].register_forward_hook(lambda _, given, __: seen.append(given[0]))
    bound(pair, images(500), temperature=1e-3)
    relaxed = seen[0].permute(0, 2, 3, 1).flatten(0, 2)  # 8,000 draws
    assert relaxed.amax(1).mean() > 0.98
    share = relaxed.argmax(1).bincount(minlength=24) / len(relaxed)
    # Standard error of a share p is sqrt(p / 8000): at most 0.003.
    assert (share - probabilities).abs().max() < 0.013


def test_gradients_reach_every_weight_and_training_lowers_the_bound():
    pair = networks("logit-laplace")
    parameters = [*pair[0].parameters(), *pair[1].parameters()]
    bound(pair, images(), kl_weight=1.0).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(40):
        loss = bound(pair, images()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_code_use_decays_and_knows_the_dead():
    use = CodeUse(4, window_steps=2, dead_share=0.5)
    use.update(torch.tensor([[[0, 0, 1, 1]]]))
    assert use.counts.tolist() == [2, 2, 0, 0]
    use.update(torch.tensor([[[0, 0, 0, 2]]]))
    assert use.counts.tolist() == [4, 1, 1, 0]
    # The fair share of 6 is 1.5, half of it 0.75.
    assert use.dead().tolist() == [False, False, False, True]
    assert use.used() == 3
    share = torch.tensor([4, 1, 1]) / 6
    assert use.perplexity() == pytest.approx(math.exp(-(share * share.log()).sum()))
    even = CodeUse(8, 10, 0.1)
    even.update(torch.arange(8).view(1, 2, 4))
    assert even.perplexity() == pytest.approx(8) and even.used() == 8


def collapsed():
    """Networks whose encoder gives code 7 to every token, after a step of AdamW."""
    pair = networks(seed=2)
    with torch.no_grad():
        pair[0].head.b[7] = 9.0
    optimizer = torch.optim.AdamW([*pair[0].parameters(), *pair[1].parameters()], lr=1e-3)
    given = bound(pair, images(64))
    given.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    use = CodeUse(24, 10, 0.02)
    before = bound(pair, images(64))
    use.update(before.codes)
    assert use.used() == 1
    return pair, optimizer, use, before


def test_dead_codes_come_back_to_life():
    pair, optimizer, use, before = collapsed()
    draws = torch.Generator().manual_seed(0)
    revived = revive_dead_codes(*pair, before, use, optimizer, margin=3.0, generator=draws)
    assert revived == 23
    after = bound(pair, images(64))
    share = after.codes.flatten().bincount(minlength=24) / after.codes.numel()
    assert int((share > 0).sum()) >= 12
    assert share.max() < 0.5
    table = pair[1].embedding.w[:, :, 0, 0]
    assert bool((table == table[:, 7:8]).all())  # every new code draws what its donor drew
    moments = optimizer.state[pair[0].head.w]["exp_avg"]
    assert moments[7].abs().sum() > 0
    assert bool((moments[[i for i in range(24) if i != 7]] == 0).all())
    # A revived code that stays unused is dead again within a window; a used one lives.
    for _ in range(10):
        use.update(torch.full((64, 4, 4), 7))
    assert use.used() == 1


def test_a_new_code_wins_at_its_token_by_the_margin():
    pair, optimizer, use, before = collapsed()
    use.counts += use.counts.sum() / 24
    use.counts[3] = 0  # one dead code
    draws = torch.Generator().manual_seed(0)
    assert revive_dead_codes(*pair, before, use, optimizer, margin=3.0, generator=draws) == 1
    rows = before.features.permute(0, 2, 3, 1).flatten(0, 2)
    head = pair[0].head
    with torch.no_grad():
        logits = F.linear(rows, head.w[:, :, 0, 0], head.b)
    gap = logits[:, 3] - logits[:, 7]
    assert float((gap - 3.0).abs().min()) < 1e-2  # the chosen token is one of these rows
    assert float(gap.mean()) == pytest.approx(0, abs=1e-2)  # split through the mean


def test_revival_leaves_a_healthy_codebook_alone():
    pair, optimizer, _, before = collapsed()
    use = CodeUse(24, 10, 0.02)
    use.update(torch.arange(24).view(1, 4, 6))
    weights = pair[0].head.w.detach().clone()
    draws = torch.Generator().manual_seed(0)
    assert revive_dead_codes(*pair, before, use, optimizer, margin=3.0, generator=draws) == 0
    assert torch.equal(weights, pair[0].head.w)


def test_identical_tokens_cannot_be_split():
    pair, optimizer, use, before = collapsed()
    flat = before._replace(features=torch.ones_like(before.features))
    draws = torch.Generator().manual_seed(0)
    assert revive_dead_codes(*pair, flat, use, optimizer, margin=3.0, generator=draws) == 0
    assert bool(pair[0].head.w.isfinite().all())


def test_token_statistics_against_counting():
    codes = torch.tensor([[0, 1, 1], [0, 1, 2], [0, 2, 3], [0, 2, 4]])
    found = token_statistics(codes, 6)
    assert found.codes_used == 5
    assert found.positional_entropy_nats == pytest.approx((0 + math.log(2) + math.log(4)) / 3)
    assert found.best_position_guess == pytest.approx((1 + 0.5 + 0.25) / 3)
    share = torch.tensor([4, 3, 3, 1, 1]) / 12
    assert found.perplexity == pytest.approx(float(torch.exp(-(share * share.log()).sum())))
    with pytest.raises(ValueError, match="images, tokens"):
        token_statistics(codes.flatten(), 6)
