"""The DALI loader: its choice, its errors, and its recovery from files that it can't decode."""

from __future__ import annotations

import os
import signal
from importlib import metadata

import numpy as np
import pytest
import torch

from fastbeit.data import BatchSchedule, MaskSpec, PlanSpec, make_loader, open_source
from fastbeit.data import backend as backend_module
from fastbeit.data.backend import choose_backend, dali_problem
from fastbeit.data.bad import TooManyBadSamples
from fastbeit.data.dali_pipeline import build_decoder, jitter_matrices
from fastbeit.data.encoded import dali_reads
from fastbeit.data.views import ViewSpec

PLAN = PlanSpec(mask=MaskSpec(grid=(4, 4), target=6, min_block=2), drop_path=0.2, depth=2)
VIEWS = ViewSpec(size=(32, 32), token_size=(16, 16))
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def loader(folder, *, batch=8, plan=PLAN, **options):
    source = open_source(folder)
    options = {"total_steps": 5, "workers": 0, "backend": "dali"} | options
    return make_loader(source, plan, VIEWS, BatchSchedule(len(source), batch, 3), seed=3, **options)


def everything(made):
    with made:
        return list(made)


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for name in ("images", "token_images", "positions", "drop_scale", "index"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def assert_close(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for name in ("positions", "drop_scale", "index"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        difference = (one.token_images - other.token_images).abs() * 255 / 0.8
        assert difference.mean() <= 0.5 and np.percentile(difference, 99) <= 2


def test_workers_prefetch_and_start_step_change_nothing(photos):
    undisturbed = everything(loader(photos, accumulation=2))
    assert len(undisturbed) == 10
    assert_same(everything(loader(photos, accumulation=2, workers=2, prefetch=3)), undisturbed)
    for start, prefetch in ((1, 1), (3, 2), (4, 5)):
        resumed = loader(photos, accumulation=2, prefetch=prefetch, start_step=start)
        assert_same(everything(resumed), undisturbed[2 * start :])
    assert everything(loader(photos, start_step=5)) == []


def test_without_jitter_the_stages_are_left_out_and_nothing_else_changes(photos):
    plain = PlanSpec(mask=PLAN.mask, jitter=(0, 0, 0), drop_path=0.2, depth=2)
    ours = everything(loader(photos, plan=plain))
    assert_close(ours, everything(loader(photos, plan=plain, backend="reference")))


@pytest.fixture
def damaged(tmp_path, photo, encode, write):
    """40 images. Bad: 3 (text), 17 and 18 (truncated). Read by PIL only: 25 (PNG without its end).

    Each of the last three makes DALI's decoder fail.
    """
    files = {f"{n:02}.jpg": encode(photo(40, 40 + n, seed=n), "JPEG") for n in range(40)}
    files["03.jpg"] = b"this is text"
    for name in ("17.jpg", "18.jpg"):
        files[name] = files[name][: -len(files[name]) // 10]
    files["25.jpg"] = encode(photo(40, 50, seed=25), "PNG")[:-12]
    return write(tmp_path / "damaged", files)


def test_the_damaged_files_fail_in_dali_as_the_other_tests_assume(damaged):
    for name, fails in (("16.jpg", False), ("17.jpg", True), ("18.jpg", True), ("25.jpg", True)):
        decoder = build_decoder(None)
        decoder.feed_input("encoded", [np.frombuffer((damaged / name).read_bytes(), np.uint8)])
        decoder.schedule_run()
        if fails:
            with pytest.raises(RuntimeError, match="decod"):
                decoder.share_outputs()
        else:
            assert np.array(decoder.share_outputs()[1].as_tensor()).tolist() == [[40, 56, 3]]


@pytest.mark.parametrize("workers", [0, 1])
def test_decode_failures_are_found_replaced_and_logged(damaged, tmp_path, workers):
    log = tmp_path / "bad_samples.jsonl"
    options = {"batch": 10, "total_steps": 9, "max_bad_fraction": 0.1, "bad_log": log}
    with loader(damaged, workers=workers, **options) as made:
        ours = list(made)
        ours_bad = {record.index: record for record in made.bad.records}
    assert len(log.read_text().splitlines()) == 3
    with loader(damaged, backend="reference", **(options | {"bad_log": None})) as made:
        theirs = list(made)
        theirs_bad = {record.index: record for record in made.bad.records}
    assert ours_bad == theirs_bad
    assert {record.index: record.substitute for record in ours_bad.values()} == {
        3: 4,
        17: 19,
        18: 19,
    }
    assert sum((batch.index == 25).sum().item() for batch in ours) >= 2  # kept, read by PIL
    assert_close(ours, theirs)


def test_a_failure_leaves_the_batches_around_it_exact(damaged):
    """Whatever was under way when DALI failed: the same as in runs that start elsewhere."""
    options = {"batch": 10, "total_steps": 8, "max_bad_fraction": 0.1}
    undisturbed = everything(loader(damaged, prefetch=1, **options))
    assert_same(everything(loader(damaged, prefetch=4, workers=2, **options)), undisturbed)
    for start in range(1, 8):
        resumed = everything(loader(damaged, prefetch=3, start_step=start, **options))
        assert_same(resumed, undisturbed[start:])


def test_too_many_decode_failures_stop_with_the_list(damaged):
    with pytest.raises(TooManyBadSamples, match="samples are bad") as caught:
        everything(loader(damaged, batch=20, total_steps=4, max_bad_fraction=0.05))
    assert "18.jpg: JPEG cannot be decoded: image file is truncated" in str(caught.value)


def test_nothing_but_undecodable_files_ends(tmp_path, photo, encode, write):
    data = encode(photo(40, 50), "JPEG")[:-60]
    folder = write(tmp_path / "bad", {f"{n}.jpg": data for n in range(6)})
    with pytest.raises(TooManyBadSamples, match="no good sample is left"):
        everything(loader(folder, batch=3, max_bad_fraction=1.0))
    with pytest.raises(TooManyBadSamples, match="2 of 6 samples are bad"):
        everything(loader(folder, batch=3, max_bad_fraction=0.01))


def test_an_error_that_no_file_causes_is_passed_on(photos, monkeypatch):
    made = loader(photos)
    monkeypatch.setattr(
        made._engine, "_collect", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    with pytest.raises(RuntimeError, match=r"decodes every file alone: out of memory"):
        next(made)


def test_a_dead_worker_is_an_error_not_taken_for_a_bad_file(photos):
    with loader(photos, workers=1, total_steps=10_000, prefetch=1) as made:
        first = next(made)
        os.kill(made._engine._pool._iterator._workers[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
            for _ in range(100):
                next(made)
        assert made.bad.count == 0 and len(first) == 8


def test_a_run_that_cannot_be_started_is_started_over(photos, monkeypatch):
    undisturbed = everything(loader(photos))
    made = loader(photos)
    engine, calls = made._engine, []
    feed = engine._feed

    def fail_once(pipeline, batch):
        calls.append(batch)
        if len(calls) == 4:  # two fill the queue; this is the second that follows
            raise RuntimeError("the pipeline is broken")
        feed(pipeline, batch)

    monkeypatch.setattr(engine, "_feed", fail_once)
    assert_same(everything(made), undisturbed)
    assert len(calls) > 5


def test_what_dali_is_given_undecoded(zoo):
    from fastbeit.data.header import inspect_image

    direct = {name for name, data in zoo.items() if dali_reads(inspect_image(data))}
    assert {"jpeg_420.jpg", "jpeg_grey.jpg", "png_palette_transparent.png"} <= direct
    assert not direct & {"jpeg_cmyk.jpg", "png_rgb_16.png", "gif.gif", "tiff_lzw.tif"}


def test_identity_matrices_for_factors_of_one():
    factors = np.ones((6, 3), np.float32)
    order = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]], np.uint8)
    for channels, columns in ((3, 5), (1, 2)):
        matrices = jitter_matrices(factors, order, channels)
        assert matrices.shape == (6, 3, channels, columns)
        identity = np.eye(channels, columns, dtype=np.float32)
        assert np.array_equal(matrices, np.broadcast_to(identity, matrices.shape))


def test_auto_takes_pil_on_a_cpu_and_dali_on_a_gpu_and_says_why(photos):
    with make_loader(
        open_source(photos), PLAN, VIEWS, BatchSchedule(24, 8, 0), seed=0, total_steps=1, workers=0
    ) as made:
        assert made.backend == "reference" and "CPU" in made.reason and "\n" not in made.reason
    assert choose_backend("auto", CUDA)[0] == "dali"
    assert choose_backend("dali", CPU) == ("dali", "DALI loader: asked for")
    assert choose_backend("reference", CUDA)[0] == "reference"


def test_without_dali_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(backend_module, "find_spec", lambda name: None)
    monkeypatch.setattr(metadata, "version", raise_not_found)
    with pytest.raises(RuntimeError, match=r'pip install "fastbeit\[gpu\]"'):
        choose_backend("dali", CUDA)
    name, reason = choose_backend("auto", CUDA)
    assert name == "reference" and "not installed" in reason and "\n" not in reason


def raise_not_found(name):
    raise metadata.PackageNotFoundError(name)


def test_the_placeholder_package_is_named(monkeypatch):
    def no_nvidia(name):
        raise ModuleNotFoundError("No module named 'nvidia'")

    monkeypatch.setattr(backend_module, "find_spec", no_nvidia)
    monkeypatch.setattr(
        metadata,
        "version",
        lambda name: "0.0.1" if name == "nvidia-dali" else raise_not_found(name),
    )
    problem = dali_problem()
    assert problem is not None and "pip uninstall nvidia-dali" in problem
    assert "placeholder" in problem and 'pip install "fastbeit[gpu]"' in problem
