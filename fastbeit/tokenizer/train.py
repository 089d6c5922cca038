"""Trains a tokenizer on one's own images.

    python -m fastbeit.tokenizer.train --data DIR --out tokenizer.safetensors [--flags]

Prints, and writes to ``tokenizer.jsonl``, the reconstruction, the KL term, codes in use, perplexity
and revived codes; saves whole or not at all. The objective is in ``objective.py``.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

import fastbeit
from fastbeit.tokenizer.dvae import Decoder, Encoder, initialise
from fastbeit.tokenizer.files import save_tokenizer
from fastbeit.tokenizer.objective import (
    CodeUse,
    cosine_between,
    relaxed_bound,
    revive_dead_codes,
)
from fastbeit.tokenizer.statistics import token_statistics
from fastbeit.tokenizer.train_config import TrainConfig
from fastbeit.tokenizer.train_log import MetricLog
from fastbeit.tokenizer.training_data import open_sources, training_batches, whole_images

REVIVAL_SHARE = 0.8  # of the steps; later, a restarted code would have no time to specialise
REVIVAL_MARGIN_NATS = 3.0  # Gumbel noise overturns it in one draw of twenty
USAGE_WINDOW_STEPS = 100
STATISTICS_IMAGES = 10_000


class Networks(NamedTuple):
    """What is being trained."""

    encoder: Encoder
    decoder: Decoder

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.encoder.parameters(), *self.decoder.parameters()]


class Validation(NamedTuple):
    """Whole images, encoded to hard codes and decoded again.

    ``mse`` is over pixels in [0, 1]; ``psnr_db`` = -10 log10(mse); ``codes_used`` and
    ``perplexity`` are of these images' codes.
    """

    mse: float
    psnr_db: float
    codes_used: int
    perplexity: float


def build_networks(config: TrainConfig, device: torch.device) -> Networks:
    """Freshly initialised networks, channels-last; the draws are made on the CPU."""
    generator = torch.Generator().manual_seed(config.seed)
    networks = Networks(Encoder(config.network()), Decoder(config.network()))
    for network in networks:
        initialise(network, generator)
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return networks


def train(config: TrainConfig, *, command: str = "") -> dict[str, Any]:
    """Trains and writes ``config.out``; returns the file's final statistics.

    Args:
        config: what to do.
        command: the command line, recorded in the file.

    Raises:
        ValueError: bad settings or bad data (see ``TrainConfig.validate``, ``open_sources``).
        FloatingPointError: the loss stopped being finite; the last save is kept.
    """
    config.validate()
    device = pick_device(config.device)
    train_source, validation_source = open_sources(config)
    validation_images = whole_images(config, validation_source, config.validation_images, device)
    networks = build_networks(config, device)
    origin: dict[str, Any] = {
        "made_by": f"fastbeit.tokenizer.train {fastbeit.__version__}, torch {torch.__version__}",
        "command": command,
        "settings": json.loads(json.dumps(asdict(config), default=str)),
        "data_fingerprint": train_source.fingerprint,
        "training_images": len(train_source),
    }

    def save(step: int) -> dict[str, Any]:
        check = validate(networks, validation_images, config.batch)
        _refuse_non_finite(config, "validation error", check.mse, step)
        log.write(step, {f"validation_{k}": v for k, v in check._asdict().items()})
        origin["steps"] = step
        origin["validation"] = {**check._asdict(), "images": len(validation_images)}
        dtype = torch.float16 if config.store == "fp16" else torch.float32
        digest = save_tokenizer(config.out, *networks, origin=origin, dtype=dtype)
        log.say(f"saved {config.out} at step {step}, sha256 {digest}")
        return origin["validation"]

    with MetricLog(config) as log:
        log.say(_announcement(config, networks, len(train_source), len(validation_source), device))
        with training_batches(config, train_source, device) as batches:
            optimise(config, networks, batches, log, device, save)
        images = whole_images(config, train_source, STATISTICS_IMAGES, device)
        codes = encode_all(networks.encoder, images, config.batch)
        statistics = token_statistics(codes, config.codes)
        origin["train_tokens"] = {**statistics._asdict(), "images": len(images)}
        check = save(config.steps)
        log.say(
            f"tokens of {len(images)} training images, not augmented: "
            f"{statistics.codes_used} of {config.codes} codes, "
            f"perplexity {statistics.perplexity:.1f}, "
            f"positional entropy {statistics.positional_entropy_nats:.3f} nats, "
            f"best position-only guess {statistics.best_position_guess:.1%}"
        )
    return {**check, "train_tokens": origin["train_tokens"]}


def optimise(
    config: TrainConfig,
    networks: Networks,
    batches: Iterator[Tensor],
    log: MetricLog,
    device: torch.device,
    save: Callable[[int], object],
) -> None:
    """The loop: one AdamW step a batch, dead codes revived, figures logged, file saved."""
    parameters = networks.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    # Noise of training, and the choice of codes to copy: both on the device, from one stream.
    generator = torch.Generator(device).manual_seed(config.seed + 1)
    use = CodeUse(config.codes, USAGE_WINDOW_STEPS, config.dead_share, device)
    revived, seen, since = 0, 0, time.monotonic()
    for step, images in enumerate(batches):
        lr = cosine_between(config.lr, config.lr_final, step, config.steps)
        lr *= min(1.0, (step + 1) / max(config.warmup_steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        temperature = cosine_between(
            *config.temperature, step, round(config.temperature_share * config.steps)
        )
        kl_weight = cosine_between(
            0.0, config.kl_weight, step, round(config.kl_warmup_share * config.steps)
        )
        bound = relaxed_bound(
            networks.encoder,
            networks.decoder,
            images.contiguous(memory_format=torch.channels_last),
            temperature=temperature,
            kl_weight=kl_weight,
            generator=generator,
            prior=use.prior() if config.prior == "usage" and step > config.warmup_steps else None,
        )
        optimizer.zero_grad(set_to_none=True)
        bound.loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        use.update(bound.codes)
        seen += len(images)
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            loss = float(bound.loss.detach())  # host sync, once a log interval
            _refuse_non_finite(config, "loss", loss, done)
            now = time.monotonic()
            log.write(
                done,
                {
                    "loss_nats": loss,
                    "reconstruction_nats": float(bound.reconstruction),
                    "kl_nats": float(bound.kl),
                    "temperature": temperature,
                    "kl_weight": kl_weight,
                    "lr": lr,
                    "grad_norm": float(grad_norm),
                    "codebook_used": use.used(),
                    "codebook_perplexity": use.perplexity(),
                    "codes_revived": revived,
                    "images_per_s": seen / max(now - since, 1e-9),
                },
            )
            seen, since = 0, now
        if config.revive_every and done % config.revive_every == 0:
            if done <= REVIVAL_SHARE * config.steps:
                revived += revive_dead_codes(
                    networks.encoder,
                    networks.decoder,
                    bound,
                    use,
                    optimizer,
                    margin=REVIVAL_MARGIN_NATS,
                    generator=generator,
                )
        if done % config.save_every == 0 and done < config.steps:
            save(done)


@torch.no_grad()
def encode_all(encoder: Encoder, images: Tensor, batch: int) -> Tensor:
    """Hard codes int64 [n, T] of mapped pixels [n, C, H, W]; both on the CPU."""
    device = encoder.head.w.device
    return torch.cat(
        [encoder(part.to(device)).argmax(1).flatten(1).cpu() for part in images.split(batch)]
    )


@torch.no_grad()
def validate(networks: Networks, images: Tensor, batch: int) -> Validation:
    """Reconstruction error and use of the codebook on mapped pixels [n, C, H, W]."""
    encoder, decoder = networks
    config = encoder.config
    grid = (images.shape[2] // config.stride, images.shape[3] // config.stride)
    codes_nT = encode_all(encoder, images, batch)
    squared_error = 0.0
    for part, codes in zip(images.split(batch), codes_nT.split(batch), strict=True):
        maps = codes.unflatten(1, grid).to(encoder.head.w.device)
        rebuilt = decoder.pixels(decoder.from_embeddings(decoder.embed(maps))).cpu()
        pixels = (part - config.pixel_offset) / config.pixel_scale
        squared_error += float((rebuilt - pixels).square().double().sum())
    mse = squared_error / images.numel()
    statistics = token_statistics(codes_nT, config.codes)
    psnr_db = -10 * math.log10(max(mse, 1e-12)) if math.isfinite(mse) else math.nan
    return Validation(mse, psnr_db, statistics.codes_used, statistics.perplexity)


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` means. ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu or cuda[:N], got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device is usable here; take cpu")
    if device.type == "cuda":
        # fp32 is fp32: by default cuDNN rounds convolutions' factors to TF32.
        torch.backends.cudnn.allow_tf32 = False
    return device


def _refuse_non_finite(config: TrainConfig, what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} is {value} at step {step}: lower --lr (now {config.lr}) or --clip (now "
            f"{config.clip}); nothing was saved since, {config.out} is as the last save left it"
        )


def _announcement(
    config: TrainConfig, networks: Networks, images: int, held_out: int, device: torch.device
) -> str:
    side = config.image_px // config.network().stride
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    return (
        f"{images:,} training and {held_out:,} validation images of {config.image_px} px: "
        f"{side} x {side} tokens, {config.codes} codes; encoder {sizes[0]:,} parameters, "
        f"decoder {sizes[1]:,}; {config.steps:,} steps of {config.batch} on {device}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line. Exit code 0, 2 for bad settings or data, 1 when training diverged."""
    words = sys.argv[1:] if arguments is None else arguments
    program = "python -m fastbeit.tokenizer.train"
    config = tyro.cli(TrainConfig, args=words, prog=program)
    try:
        train(config, command=f"{program} {shlex.join(words)}")
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
