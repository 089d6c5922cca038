"""After the last step: export the encoder, look at what it learned, and write it all down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fastbeit.batch import MimBatch
from fastbeit.data import BatchSchedule, make_loader, open_source
from fastbeit.data.views import ViewSpec
from fastbeit.evaluation import EvaluationResult, evaluate_encoder
from fastbeit.interop import save_weights
from fastbeit.model import BeitForMim
from fastbeit.report import write_report
from fastbeit.training import checkpoint, distributed
from fastbeit.training.chance import PositionalStats
from fastbeit.training.config import PretrainConfig
from fastbeit.training.cost import mfu_meter
from fastbeit.training.distributed import World
from fastbeit.training.metrics import METRICS_FILE, read_metrics
from fastbeit.training.progress import RunLog

REPORT_IMAGES = 8
LAST_SHARE = 0.05
"""Share of the run, at its end, that the final training numbers are means over."""


def finish_run(
    config: PretrainConfig,
    world: World,
    sharded: torch.nn.Module,
    tokenizer: Any,
    source: Any,
    views: ViewSpec,
    stats: PositionalStats,
    log: RunLog,
) -> None:
    """Write ``model.safetensors``, ``summary.json`` and ``report.html``. A collective call."""
    state = distributed.full_state(sharded)
    chance = stats.measure()  # host sync
    if not world.is_main:
        return
    run_dir = config.run_dir
    model = BeitForMim(config.model)
    model.load_state_dict(state)
    model.eval()
    save_weights(model, run_dir / "model.safetensors", format="official")

    summary: dict[str, Any] = {
        "recipe": config.recipe,
        **last_numbers(run_dir / METRICS_FILE),
        "chance_loss_nats": chance.loss_nats,
        "chance_accuracy": chance.accuracy,
        "codebook_size": config.model.vocab_size,
        "codebook_used": chance.codes_used,
        "codebook_perplexity": chance.perplexity,
        "mfu_peak": mfu_meter(config, tokenizer, world.device).label,
    }
    summary["below_chance_nats"] = summary["chance_loss_nats"] - summary["loss_nats"]
    summary["above_chance_points"] = 100 * (summary["accuracy"] - summary["chance_accuracy"])
    log.note(
        f"masked loss {summary['loss_nats']:.3f} nats, {summary['below_chance_nats']:.3f} below "
        f"the positional entropy {chance.loss_nats:.3f}; "
        f"accuracy {100 * summary['accuracy']:.1f} %, "
        f"{summary['above_chance_points']:.1f} points above the best guess from the position "
        f"({100 * chance.accuracy:.1f} %); {chance.codes_used} of {config.model.vocab_size} codes "
        "in use"
    )
    if config.run.evaluate and config.data.data == "demo":
        validation = masked_validation(config, model, tokenizer, views)
        result = probe_demo(config, model)
        summary["validation"] = validation
        summary["evaluation"] = result.to_dict()
        log.note(
            f"on held-out images: masked loss {validation['loss_nats']:.3f} nats, accuracy "
            f"{100 * validation['accuracy']:.1f} %"
        )
        log.note(result.table())
        log.note(
            f"linear probe: {100 * result.probe_gain:+.1f} points over the random encoder; "
            + ("above" if result.beats_pixels else "below")
            + " raw pixels"
        )
    checkpoint.write_durably(run_dir / "summary.json", json.dumps(summary, indent=1))
    images = sample_batch(config, source, views)
    report = write_report(
        run_dir, model=model, tokenizer=tokenizer, batch=images, config=config, summary=summary
    )
    shutil.rmtree(run_dir / "heartbeats", ignore_errors=True)
    log.note(f"encoder: {run_dir / 'model.safetensors'}; report: {report}")


def last_numbers(path: Path) -> dict[str, Any]:
    """Steps and means over the last part of a run, from its metrics."""
    lines = read_metrics(path)
    final = lines[-1]["step"]
    tail = [
        line
        for line in lines
        if line["step"] >= (1 - LAST_SHARE) * final and line["loss_nats"] is not None
    ]
    if not tail:
        raise ValueError(
            f"no step near the end of the run had a finite loss, see {path}; lower --lr"
        )
    mean = {
        name: sum(line[name] for line in tail) / len(tail)
        for name in ("loss_nats", "accuracy", "images_per_s", "data_wait_share")
    }
    kept = ("images_seen", "skipped_steps", "bad_samples", "time_s")
    return {**mean, "steps": final, **{name: lines[-1][name] for name in kept}}


def masked_validation(
    config: PretrainConfig, model: BeitForMim, tokenizer: Any, views: ViewSpec
) -> dict[str, float]:
    """Masked loss and accuracy on the demo's validation split, augmented as in training."""
    source = open_source("demo", split="validation")
    batch_size = 100
    schedule = BatchSchedule(len(source), batch_size, config.run.seed)
    loss = correct = count = 0.0
    with (
        torch.no_grad(),
        make_loader(
            source,
            config.plan_spec(),
            views,
            schedule,
            seed=config.run.seed,
            total_steps=schedule.steps_per_epoch,
            backend="reference",
            workers=0,
        ) as loader,
    ):
        for batch in loader:
            there = batch.to(_device(tokenizer))
            targets = tokenizer.encode(there.token_images, there.positions)
            out = model.loss(batch.images, batch.positions, targets.cpu())
            loss += float(out.loss * out.count)
            correct += float(out.correct)
            count += float(out.count)
    return {"images": len(source), "loss_nats": loss / count, "accuracy": correct / count}


def probe_demo(config: PretrainConfig, model: BeitForMim) -> EvaluationResult:
    """Linear probe and kNN on the demo's labelled splits, beside a random encoder and pixels."""
    return evaluate_encoder(
        model,
        BeitForMim(config.model, seed=config.run.seed).eval(),
        {name: open_source("demo", split=name) for name in ("train", "validation", "test")},
        mean=config.data.mean,
        std=config.data.std,
        seed=config.run.seed,
    )


def sample_batch(config: PretrainConfig, source: Any, views: ViewSpec) -> MimBatch:
    """A few images as the model sees them, for the report: held-out ones where there are any."""
    if config.data.data == "demo":
        source = open_source("demo", split="validation")
    count = min(REPORT_IMAGES, len(source))
    schedule = BatchSchedule(len(source), count, config.run.seed)
    with make_loader(
        source,
        config.plan_spec(),
        views,
        schedule,
        seed=config.run.seed,
        total_steps=1,
        backend="reference",
        workers=0,
    ) as loader:
        return next(iter(loader))


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device
