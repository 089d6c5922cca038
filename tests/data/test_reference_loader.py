"""The PIL loader: exact whatever the workers, robust against bad files, quick to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbeit.data import BatchSchedule, MaskSpec, PlanSpec, draw_plan, make_loader, open_source
from fastbeit.data.bad import TooManyBadSamples
from fastbeit.data.decode import decode_image
from fastbeit.data.loader import default_workers
from fastbeit.data.views import ViewSpec, draw_views, finish_views

PLAN = PlanSpec(mask=MaskSpec(grid=(4, 4), target=6, min_block=2), drop_path=0.2, depth=3)
VIEWS = ViewSpec(size=(32, 32), token_size=(16, 16))


def loader(folder, *, batch=8, seed=3, **options):
    source = open_source(folder)
    options = {"total_steps": 5, "workers": 0, "backend": "reference"} | options
    schedule = BatchSchedule(len(source), batch, seed=seed)
    return make_loader(source, PLAN, VIEWS, schedule, seed=seed, **options)


def everything(made):
    with made:
        return list(made)


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for name in ("images", "token_images", "positions", "drop_scale", "index"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_batch_is_what_the_plan_says(photos):
    source = open_source(photos)
    schedule = BatchSchedule(len(source), 8, seed=3)
    batches = everything(loader(photos))  # 24 images: the fourth batch is in the second epoch
    assert len(batches) == 5
    for step, batch in enumerate(batches):
        epoch, index = schedule.indices(step, micro=0, accumulation=1, rank=0, world_size=1)
        assert batch.index.tolist() == index.tolist() and epoch == step // 3
        pixels = [decode_image(source.read(i)) for i in index.tolist()]
        plan = draw_plan(PLAN, 3, epoch, index, np.array([p.shape[:2] for p in pixels]))
        assert np.array_equal(batch.positions, plan.positions)
        assert np.array_equal(batch.drop_scale, plan.drop_scale)
        assert (batch.drop_scale == 0).any() or step
        for row, image in enumerate(pixels):
            views = draw_views(Image.fromarray(image), plan, row, VIEWS)
            student, tokens = finish_views(*(np.asarray(v)[None] for v in views), VIEWS, "cpu")
            assert torch.equal(batch.images[row], student[0])
            assert torch.equal(batch.token_images[row], tokens[0])
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_workers_and_start_step_change_nothing(photos):
    undisturbed = everything(loader(photos, accumulation=2))
    assert len(undisturbed) == 10
    assert_same(everything(loader(photos, accumulation=2, workers=2)), undisturbed)
    resumed = loader(photos, accumulation=2, workers=1, prefetch=1, start_step=3)
    assert_same(everything(resumed), undisturbed[6:])
    assert everything(loader(photos, start_step=5)) == []


def test_ranks_split_the_global_batch(photos):
    alone = everything(loader(photos))
    ranks = [everything(loader(photos, rank=r, world_size=2)) for r in range(2)]
    for step, batch in enumerate(alone):
        for name in ("images", "positions", "index"):
            together = torch.cat([getattr(rank[step], name) for rank in ranks])
            assert torch.equal(together, getattr(batch, name))


def test_batches_through_pipes_when_shared_memory_is_small(photos, monkeypatch):
    monkeypatch.setattr("fastbeit.data.workers._shared_memory_holds", lambda needed: False)
    assert_same(everything(loader(photos, workers=1)), everything(loader(photos)))


def test_the_random_generators_of_training_are_left_alone(photos):
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    everything(loader(photos, workers=1, total_steps=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.fixture
def damaged(tmp_path, photo, encode, write, png_file):
    """40 images of which 3 (text), 4 (empty), 17 (truncated) and 39 (absurd) are bad."""
    files = {f"{n:02}.jpg": encode(photo(40, 40 + n, seed=n), "JPEG") for n in range(40)}
    files["03.jpg"], files["04.jpg"] = b"this is text", b""
    files["17.jpg"] = files["17.jpg"][: -len(files["17.jpg"]) // 10]
    huge = b"\0\0\xff\xff" * 2 + b"\x08\x02\0\0\0"
    files["39.jpg"] = png_file([(b"IHDR", huge), (b"IEND", b"")])
    return write(tmp_path / "damaged", files)


SUBSTITUTES = {3: 5, 4: 5, 17: 18, 39: 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_by_the_next_good_one(damaged, tmp_path, workers):
    source = open_source(damaged)
    log = tmp_path / "bad_samples.jsonl"
    schedule = BatchSchedule(40, 20, seed=3)
    options = {"batch": 20, "max_bad_fraction": 0.1, "bad_log": log, "workers": workers}
    with loader(damaged, total_steps=4, **options) as made:
        batches = list(made)
        records = made.bad.records
    for step, batch in enumerate(batches):
        epoch, wanted = schedule.indices(step, micro=0, accumulation=1, rank=0, world_size=1)
        used = [SUBSTITUTES.get(index, index) for index in wanted.tolist()]
        assert batch.index.tolist() == used
        for row, index in enumerate(used):  # the substitute's own plan, pixels and all
            pixels = decode_image(source.read(index))
            plan = draw_plan(PLAN, 3, epoch, [index], [pixels.shape[:2]])
            assert np.array_equal(batch.positions[row], plan.positions[0])
            assert np.array_equal(batch.drop_scale[row], plan.drop_scale[0])
            student, tokens = draw_views(Image.fromarray(pixels), plan, 0, VIEWS)
            student, tokens = finish_views(
                np.asarray(student)[None], np.asarray(tokens)[None], VIEWS, "cpu"
            )
            assert torch.equal(batch.images[row], student[0])
            assert torch.equal(batch.token_images[row], tokens[0])
    assert {record.index: record.substitute for record in records} == SUBSTITUTES
    assert [Path(record.path).name for record in records if record.index == 17] == ["17.jpg"]
    reasons = {record.index: record.reason for record in records}
    assert "not an image" in reasons[3] and "empty" in reasons[4]
    assert "cannot be decoded" in reasons[17] and "65535x65535" in reasons[39]
    assert len(log.read_text().splitlines()) == 4


def test_a_file_that_vanishes_is_a_bad_sample(tmp_path, write, photo, encode):
    files = {f"{n}.png": encode(photo(9, 9, seed=n), "PNG") for n in range(4)}
    made = loader(write(tmp_path / "few", files), batch=4, total_steps=1)
    (tmp_path / "few" / "2.png").unlink()
    with made:
        batch = next(made)
        assert sorted(batch.index.tolist()) == [0, 1, 3, 3]
        assert "cannot be read" in made.bad.records[0].reason


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_with_the_list(damaged, tmp_path, workers):
    log = tmp_path / "bad_samples.jsonl"
    options = {"batch": 20, "max_bad_fraction": 0.05, "bad_log": log, "workers": workers}
    with pytest.raises(TooManyBadSamples, match="3 of 40 samples are bad") as caught:
        everything(loader(damaged, total_steps=40, **options))
    assert str(log) in str(caught.value) and "39.jpg: PNG header claims" in str(caught.value)


def test_nothing_but_bad_samples_ends(tmp_path, write):
    folder = write(tmp_path / "bad", {f"{n}.jpg": b"x" for n in range(30)})
    with pytest.raises(TooManyBadSamples, match="samples are bad"):
        everything(loader(folder, batch=10, max_bad_fraction=0.1))
    with pytest.raises(TooManyBadSamples, match="no good sample is left"):
        everything(loader(folder, batch=10, max_bad_fraction=1.0))


def children() -> set[int]:
    """Processes of this one whose command line is a worker's: those that a loader started."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if b"forkserver" in command and state[0] != "Z":
            found.add(int(entry.name))
    return found


def worker_pids(made) -> list[int]:
    return [worker.pid for worker in made._engine._iterator._workers]


def wait_until_gone(pids) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not children() & set(pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"still there: {children() & set(pids)}")


def test_closing_is_quick_and_leaves_no_process(photos):
    made = loader(photos, workers=2, total_steps=10_000)
    next(made)
    pids = worker_pids(made)
    assert children() >= set(pids)
    start = time.monotonic()
    made.close()
    assert time.monotonic() - start < 3
    wait_until_gone(pids)
    with pytest.raises(StopIteration):
        next(made)


def test_signals_to_the_group_do_not_stop_workers(photos):
    undisturbed = everything(loader(photos))
    with loader(photos, workers=2, prefetch=1) as made:
        batches = [next(made)]
        for pid in worker_pids(made):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                # Sent by another process, as a terminal or a job scheduler would.
                subprocess.run(["kill", f"-{int(number)}", str(pid)], check=True)
        time.sleep(0.2)
        batches += list(made)
    assert_same(batches, undisturbed)


def test_a_dead_worker_is_an_error_not_a_hang(photos):
    made = loader(photos, workers=2, total_steps=10_000, prefetch=1)
    next(made)
    pids = worker_pids(made)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        for _ in range(100):
            next(made)
    wait_until_gone(pids)


SCRIPT = """
import os, sys
from fastbeit.data import BatchSchedule, MaskSpec, PlanSpec, make_loader, open_source
from fastbeit.data.views import ViewSpec
print("imported", flush=True)
source = open_source(sys.argv[1])
made = make_loader(
    source, PlanSpec(mask=MaskSpec(grid=(4, 4), target=6, min_block=2)),
    ViewSpec(size=(32, 32), token_size=(16, 16)), BatchSchedule(len(source), 8, 0),
    seed=0, total_steps=10_000, workers=2,
)
next(made)
print("pids", *(worker.pid for worker in made._engine._iterator._workers), flush=True)
if sys.argv[2] == "wait":
    import time; time.sleep(60)
if sys.argv[2] == "raise":
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize("how", ["end", "raise", "wait"])
def test_scripts_without_a_guard_work_and_leave_no_worker(photos, tmp_path, how):
    """No ``if __name__ == "__main__"``; ends without close, by an exception, or by SIGKILL."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(photos), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "imported\n"
    pids = [int(word) for word in process.stdout.readline().split()[1:]]
    assert len(pids) == 2
    if how == "wait":
        process.kill()
    rest, error = process.communicate(timeout=30)
    assert rest == "" and process.returncode == {"end": 0, "raise": -2, "wait": -9}[how], error
    wait_until_gone(pids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_step": 6}, "0 <= start_step <= total_steps, got 6 and 5"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
        ({"workers": -1}, "workers at least 0"),
        ({"accumulation": 3}, "8"),
        ({"backend": "torch"}, "backend must be one of auto, dali, reference, got 'torch'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(photos, options, message):
    with pytest.raises(ValueError, match=message):
        loader(photos, **options)


def test_default_workers_share_the_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for cores, ranks, device, expected in (
        (1, 1, "cpu", 0),
        (2, 1, "cpu", 1),
        (16, 1, "cpu", 4),
        (16, 8, "cpu", 1),
        (16, 1, "cuda", 15),
        (192, 8, "cuda", 16),
        (8, 8, "cuda", 1),
    ):
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda _, c=cores: set(range(c)), raising=False
        )
        assert default_workers(torch.device(device), ranks) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    assert default_workers(torch.device("cuda"), 64) == 7
