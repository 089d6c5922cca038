"""BEiT pre-training (arXiv 2106.08254): masked image modelling on discrete visual tokens.

    torchrun --standalone -m fastbeit.pretrain                          # the demo, minutes on a CPU
    torchrun --nproc-per-node 8 -m fastbeit.pretrain beit-base-in1k --data /data/imagenet/train
    python -m fastbeit.pretrain beit-base-in1k --plan                   # what it would take

The same command resumes. This file is the whole path from flags to an exported encoder, top to
bottom; exit codes are in ``fastbeit/training/control.py``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastbeit import cli
from fastbeit.batch import MimBatch
from fastbeit.data import BatchSchedule, make_loader, open_source
from fastbeit.data.bad import TooManyBadSamples
from fastbeit.model import BeitForMim
from fastbeit.training import checkpoint, control, distributed, ending, layout, setup
from fastbeit.training.backends import settle_backends
from fastbeit.training.chance import PositionalStats
from fastbeit.training.compiling import compile_blocks
from fastbeit.training.config import PretrainConfig
from fastbeit.training.cost import mfu_meter
from fastbeit.training.feed import Feed
from fastbeit.training.finish import finish_run
from fastbeit.training.graph import GraphedStep
from fastbeit.training.optimizer import (
    build_optimizer,
    make_capturable,
    optimizer_tensors,
    set_lr,
)
from fastbeit.training.schedule import cosine_schedule
from fastbeit.training.speed import check_speed, settle_speed
from fastbeit.training.step import TrainStep, Window
from fastbeit.training.tokenizing import load_run_tokenizer


def main(argv: list[str] | None = None) -> int:
    """Parse flags and train; returns the process's exit code."""
    command = cli.parse(sys.argv[1:] if argv is None else argv)
    if command.plan:
        cli.print_plan(command)
        return control.EXIT_OK
    run_dir, rank = command.config.run_dir, int(os.environ.get("RANK", "0"))
    if code := control.deliberate_end(run_dir):
        return code
    try:
        return train(command.config, distributed.start(command.config.run.device))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if rank:  # where rank 0 failed too, it says why, and torchrun ends this one meanwhile
            time.sleep(cli.GRACE_S)
        print(f"error{f' on rank {rank}' * bool(rank)}: {error}", file=sys.stderr, flush=True)
        wrong_input = isinstance(error, FileNotFoundError) or not isinstance(error, OSError)
        code = control.EXIT_USAGE if wrong_input else control.EXIT_STORAGE
        if run_dir.is_dir() and not isinstance(error, setup.InUse):
            with contextlib.suppress(OSError):
                control.write_exit(run_dir, code, 0, str(error))
        if distributed.several_ranks():  # leaving an NCCL group would wait for them
            distributed.leave(code)
        return code
    finally:
        distributed.stop()


def train(
    config: PretrainConfig, world: distributed.World, after_step: Callable[[], None] = lambda: None
) -> int:
    """Run or resume ``config``; the exit code. What ``after_step`` raises ends the run unsaved."""
    # 1. Data, tokenizer, and what follows from them. Wrong input ends here, before any training.
    run_dir = config.run_dir
    lock = setup.lock_run(run_dir, world)  # held until this function returns
    saved = setup.open_run(config, world)
    asked, config = config, setup.settle_precision(config, world.device)
    check_speed(config, world)
    backends, notes = settle_backends(config, world.device)
    distributed.seed_everything(config.run.seed)
    source = setup.in_turn(world, lambda: open_source(config.data.data))
    total_steps = layout.total_steps(config, len(source))
    warmup_steps = layout.warmup_steps(config, len(source))
    micro_batch, accumulation, batch_note = layout.resolve_batch(config, world.size)
    tokenizer, config, told = load_run_tokenizer(config, source, world, saved)
    views = setup.view_spec(config, tokenizer)
    plan = config.plan_spec()
    schedule = BatchSchedule(len(source), config.run.global_batch, config.run.seed)
    speed = settle_speed(config, tokenizer.config, world, micro_batch)
    notes += [*told, *speed.notes]

    # 2. Model and optimizer, the same on every rank, spread by FSDP2 where there are several.
    model = BeitForMim(config.model, seed=config.run.seed, backends=backends).to(world.device)
    model.set_checkpointing(speed.checkpointing)
    notes.append(compile_blocks(model, config, world, total_steps, graph=speed.graph))
    placement = distributed.place_model(
        model, world, mode=config.run.shard, precision=config.run.precision
    )
    optimizer = build_optimizer(model, config.optimizer)
    grid = config.model.grid
    stats = PositionalStats(grid[0] * grid[1], config.model.vocab_size, world.device)

    def encode(batch: MimBatch) -> torch.Tensor:
        return tokenizer.encode(batch.token_images, batch.positions)

    step_runner: TrainStep | GraphedStep = TrainStep(
        model,
        optimizer,
        encode,
        world,
        slots=config.run.global_batch * plan.mask.slots,
        clip_norm=config.optimizer.clip_norm,
        copies=placement.copies,
        weights=placement.weights,
        observe=stats.update,
    )
    if speed.graph:
        make_capturable(optimizer, world.device)
        step_runner = GraphedStep(step_runner)

    # 3. Where it was left, if it was.
    def tensors() -> dict[str, torch.Tensor]:
        stats.fold()
        return {
            **{f"model.{name}": value for name, value in model.state_dict().items()},
            **{f"optimizer.{name}": v for name, v in optimizer_tensors(optimizer).items()},
            "chance.counts": stats.tensor,
        }

    start_step = 0
    if saved is not None:
        setup.restore(
            saved,
            tensors(),
            stats,
            source.fingerprint,
            tokenizer.describe().get("sha256"),
            config.run.allow_config_change,
            world,
        )
        start_step = saved.step
        setup.check_length(config, start_step, total_steps)
    saver = checkpoint.Checkpointer(
        run_dir / "checkpoints", world, keep=config.run.keep_checkpoints
    )
    meter = mfu_meter(config, tokenizer, world.device)
    log = setup.open_log(
        config, world, total_steps=total_steps, start_step=start_step, mfu_peak=meter.label
    )
    loader = make_loader(
        source,
        plan,
        views,
        schedule,
        seed=config.run.seed,
        start_step=start_step,
        total_steps=total_steps,
        accumulation=accumulation,
        rank=world.rank,
        world_size=world.size,
        backend=config.data.loader,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        hw_decoder_load=config.data.hw_decoder_load,
        device=world.device,
        dtype=setup.DTYPES[config.run.precision],
        token_dtype=setup.DTYPES[config.tokenizer.tokenizer_precision],
        bad_log=run_dir / "bad_samples.jsonl",
        max_bad_fraction=config.data.max_bad_fraction,
        max_pixels=config.data.max_pixels,
    )
    setup.announce(log, config, world, source, tokenizer, loader, batch_note, notes, saved)

    # 4. The loop. Nothing in it waits for the device except where "host sync" says so.
    vote = control.StopVote(world)
    trap = control.SignalTrap(vote, world)
    watchdog = control.Watchdog(
        run_dir / "heartbeats", world, limit_s=60 * config.run.stall_minutes
    )
    window = Window(world.device)
    # The device may be a few steps behind when it tells of the first bad one.
    recent: deque[tuple[int, list[int]]] = deque(maxlen=config.run.nonfinite_limit + 16)
    last_step = min(total_steps, config.run.stop_after or total_steps)
    feed = Feed(
        loader,
        watchdog,
        world.device,
        batches=(last_step - start_step) * accumulation,
        encode=encode if speed.ahead else None,
        graph=speed.graph,
    )
    skipped = saved.state["skipped_steps"] if saved else 0
    trained_s = saved.state["trained_s"] if saved else 0.0
    began_s = window_s = time.perf_counter()
    window_step = finished = start_step
    code = control.EXIT_OK

    def state() -> dict[str, Any]:
        return {
            "world_size": world.size,
            "device": world.device.type,
            "data_fingerprint": source.fingerprint,
            "tokenizer": tokenizer.describe(),
            "skipped_steps": skipped,
            "trained_s": trained_s + time.perf_counter() - began_s,
            "config": setup.config_as_json(asked),
        }

    def save(step: int) -> None:
        watchdog.at(step, "saving")
        saver.save(step, {**tensors(), **checkpoint.rng_tensors(world)}, state())

    try:
        for step in range(start_step, total_steps):
            lr = cosine_schedule(
                step, config.optimizer.lr, config.optimizer.min_lr, total_steps, warmup_steps
            )
            set_lr(optimizer, lr)
            result = step_runner.run(feed.take(step, accumulation), accumulation)
            window.add(result)
            finished = step + 1
            recent.append((step, feed.sample_ids))
            after_step()
            if finished - start_step == setup.WARM_UP_STEPS:
                setup.tell_warm_up(log, world.device, began_s)  # host sync, once a run

            if window.streak_if_ready() >= config.run.nonfinite_limit:
                vote.ask(control.EXIT_NONFINITE)
            code = vote.outcome()
            last = bool(code) or finished in (total_steps, config.run.stop_after)
            if finished % config.run.log_every == 0 or last:
                numbers = window.read()  # host sync
                now_s = time.perf_counter()
                step_s = (now_s - window_s) / (finished - window_step)
                images_per_s = config.run.global_batch / step_s
                chance = stats.measure()  # host sync
                skipped += int(numbers.pop("skipped_steps") or 0)
                log.log(
                    finished,
                    epoch=finished / schedule.steps_per_epoch,
                    **numbers,
                    chance_loss_nats=chance.loss_nats,
                    chance_accuracy=chance.accuracy,
                    lr=lr,
                    images_per_s=images_per_s,
                    step_ms=1000 * step_s,
                    data_wait_share=feed.read_waited_s() / (now_s - window_s),
                    codebook_used=chance.codes_used,
                    codebook_perplexity=chance.perplexity,
                    mfu=meter.mfu(images_per_s / world.size),
                    skipped_steps=skipped,
                    bad_samples=loader.bad.count,
                    images_seen=finished * config.run.global_batch,
                    time_s=trained_s + now_s - began_s,
                )
                window_s, window_step = now_s, finished
            log.tick(finished)
            if finished % config.run.checkpoint_every == 0 and not last:
                setup.forgiving(log, partial(save, finished))
            setup.forgiving(log, saver.poll)
            if last:
                break
        vote.close()
        if start_step < total_steps:
            save(finished)
            saver.wait()
            world.barrier()  # no rank leaves before rank 0 has published it
    except torch.OutOfMemoryError as error:
        advice = ending.out_of_memory_advice(error, micro_batch, accumulation)
        return ending.end_alone(run_dir, world, control.EXIT_USAGE, finished, advice)
    except TooManyBadSamples as error:
        if world.size == 1 and finished > start_step:
            with contextlib.suppress(OSError):  # the checkpoint before it stands
                save(finished)
                saver.wait()
        return ending.end_alone(run_dir, world, control.EXIT_BAD_DATA, finished, str(error))
    except OSError as error:
        return ending.end_alone(run_dir, world, control.EXIT_STORAGE, finished, str(error))
    except ValueError as error:  # a fault of the program, not of its input: with a traceback
        raise RuntimeError(f"step {finished} could not be finished") from error
    finally:
        feed.close()
        watchdog.close()
        trap.release()
        if code or finished < total_steps:
            with contextlib.suppress(OSError):  # disk full: what was flushed stays
                log.close()

    # 5. Stopped early: say why. Finished: export, evaluate, report.
    if code:
        reason = trap.received or "another rank was asked to stop"
        if code == control.EXIT_NONFINITE:
            reason = ending.save_nonfinite(run_dir, world, recent, source)
            print(f"rank {world.rank}: {reason}", file=sys.stderr, flush=True)
        return ending.end(run_dir, world, code, finished, reason)
    if finished < total_steps:
        return ending.end(run_dir, world, control.EXIT_OK, finished, "--stop-after was reached")
    finish_run(config, world, model, tokenizer, source, views, stats, log)
    log.close()
    del lock
    return ending.end(run_dir, world, control.EXIT_OK, finished, "finished")


if __name__ == "__main__":
    distributed.leave(main())
