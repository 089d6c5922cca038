"""Tuning the loader: the search, measuring, the command, and the hardware decoder's share."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbeit import cli
from fastbeit.batch import MimBatch
from fastbeit.data import (
    BatchSchedule,
    MaskSpec,
    PlanSpec,
    dali_pipeline,
    make_loader,
    open_source,
    tune,
    tune_record,
    tune_search,
)
from fastbeit.data import dali as dali_module
from fastbeit.data.tune_search import Axes, Search, Setting, counts_up_to, loader_rate
from fastbeit.data.views import ViewSpec
from fastbeit.recipes import load_recipe
from fastbeit.training.config_io import config_from_dict, config_to_dict, diff_configs

START = Setting("dali", 1, 1, 0.6)
AXES = Axes(START, workers=(1, 2, 4, 8), prefetch=(1, 2, 4), hw_decoder_load=(0.6, 0.7, 0.8, 0.9))
FOREVER = float("inf")


def hill(setting: Setting) -> float:
    """Best at 4 workers, 2 ahead and 0.8: the axes matter one by one and together."""
    assert setting.hw_decoder_load is not None
    far = abs(setting.workers - 4) / 4 + abs(setting.prefetch - 2) / 2
    return 1000 / (1 + far + 3 * abs(setting.hw_decoder_load - 0.8) * (1 + far))


# ---------------------------------------------------------------- the search


def test_the_search_finds_the_top_and_measures_each_setting_once_a_round() -> None:
    asked: list[Setting] = []

    def measure(setting: Setting) -> float:
        asked.append(setting)
        return hill(setting)

    search = Search(measure, rounds=3, ends_s=FOREVER)
    found = search.run(AXES)
    assert found == Setting("dali", 4, 2, 0.8)
    assert not search.cut_short
    assert len(search.rates) < 24 < 48  # of all that there are
    assert all(len(rates) % 3 == 0 for rates in search.rates.values())
    # In turn, the one in hand with the new ones: nothing is measured twice in a row.
    assert asked[:4] == asked[4:8] == [replace(START, workers=w) for w in (1, 2, 4, 8)]
    assert all(one != other for one, other in pairwise(asked))


def test_medians_decide_and_a_hair_more_does_not() -> None:
    noisy = {1: [100.0, 100.0, 100.0], 2: [900.0, 50.0, 60.0], 4: [10.0, 120.0, 130.0]}
    search = Search(lambda s: noisy[s.workers].pop(0), rounds=3, ends_s=FOREVER)
    assert search.fastest([replace(START, workers=w) for w in (1, 2, 4)]).workers == 4
    search.rates = {START: [100.0], replace(START, workers=2): [70.0]}
    assert search.duel(list(search.rates)) == START  # far apart: nothing is left in noisy[1] to ask
    close = Search(lambda s: 100.0 * s.workers, rounds=2, ends_s=FOREVER)
    close.rates = {START: [100.0], replace(START, workers=2): [90.0]}
    assert close.duel([START, replace(START, workers=2)]).workers == 2
    flat = Search(lambda s: 100 + s.workers / 10, rounds=1, ends_s=FOREVER)
    assert flat.run(AXES) == START  # up to 0.8 % more is within the margin


def test_when_the_time_is_over_what_was_measured_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tune_search.time, "monotonic", lambda: now[0])

    def measure(setting: Setting) -> float:
        now[0] += 1
        return hill(setting)

    search = Search(measure, rounds=2, ends_s=5.0)
    assert search.run(AXES) == replace(START, workers=4)  # after four values, and one once more
    assert search.cut_short and sum(map(len, search.rates.values())) == 5
    late = Search(measure, rounds=2, ends_s=-1.0)  # the start is always measured
    assert late.run(AXES) == START and late.rates == {START: [hill(START)]}
    alone = Search(measure, rounds=2, ends_s=FOREVER)  # nothing to try but the start
    assert alone.run(Axes(START, (1,), (1,))) == START and len(alone.rates[START]) == 2


def test_counts_and_flags() -> None:
    assert [counts_up_to(most) for most in (0, 1, 2, 6, 16)] == [
        [],
        [1],
        [1, 2],
        [1, 2, 4, 6],
        [1, 2, 4, 8, 16],
    ]
    words = Setting("dali", 8, 4, 0.75).flags().split()
    config = cli.parse(["beit-base-in1k", "--data", "demo", *words]).config.data
    assert (config.loader, config.workers, config.prefetch) == ("dali", 8, 4)
    assert config.hw_decoder_load == 0.75
    assert Setting("reference", 0, 2).flags() == "--loader reference --workers 0 --prefetch 2"


# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize(
    ("ready", "interval_s", "setting", "seconds", "taken"),
    [
        # Two workers with two each, two in the pipeline, one: dropped. Then 20 in ten seconds.
        (7, 0.5, Setting("dali", 2, 2), 10.0, 7 + 20),
        # Ten could be ready; after one that was waited for no more are dropped. Three at least.
        (2, 3.0, Setting("dali", 1, 4), 2.0, 3 + 3),
        # Two of each worker at least.
        (6, 3.0, Setting("reference", 4, 1), 2.0, 6 + 8),
    ],
)
def test_what_was_ready_before_the_clock_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
    ready: int,
    interval_s: float,
    setting: Setting,
    seconds: float,
    taken: int,
) -> None:
    """A loader that gives ``ready`` batches of 8 at once, and then one every ``interval_s``."""
    now = [0.0]
    monkeypatch.setattr(tune_search.time, "perf_counter", lambda: now[0])

    class Fake:
        given = 0
        closed = False

        def __next__(self) -> MimBatch:
            self.given += 1
            now[0] += interval_s if self.given > ready else 0.0
            views = torch.zeros(8, 1, 2, 2)
            return MimBatch(views, views, torch.zeros(8, 1), None, torch.arange(8))

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *error: object) -> None:
            self.closed = True

    fake: Any = Fake()
    assert loader_rate(lambda _: fake, setting, seconds) == pytest.approx(8 / interval_s)
    assert fake.closed and fake.given == taken


# ---------------------------------------------------------------- what is tried where


def test_a_gpu_with_a_hardware_decoder_gets_its_share_swept(monkeypatch: Any) -> None:
    config, gpu = load_recipe("beit-base-in1k"), torch.device("cuda", 0)
    for capability, swept in (((9, 0), True), ((8, 0), True), ((8, 9), False), ((7, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        axes = tune.axes_of("dali", config, gpu, cores=12)
        assert axes.workers == [1, 2, 4, 8, 12]
        assert axes.start.hw_decoder_load == (0.65 if swept else None)
        assert ("hw_decoder_load" in axes.names) == swept
    assert (min(tune.HW_DECODER_LOADS), max(tune.HW_DECODER_LOADS)) == (0.6, 0.9)
    axes = tune.axes_of("reference", config, torch.device("cpu"), cores=2)
    assert axes.workers == [0, 1, 2] and axes.names == ["workers", "prefetch"]


def test_both_loaders_on_a_cpu_dali_on_a_gpu_or_what_was_asked_for(monkeypatch: Any) -> None:
    config = load_recipe("demo")
    asked = replace(config, data=replace(config.data, loader="reference"))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(tune, "dali_problem", lambda: None)
    assert tune.loaders_of(config, cpu) == ["reference", "dali"]
    assert tune.loaders_of(config, gpu) == ["dali"]
    assert tune.loaders_of(asked, gpu) == ["reference"]
    monkeypatch.setattr(tune, "dali_problem", lambda: "not installed")
    assert tune.loaders_of(config, cpu) == ["reference"]


# ---------------------------------------------------------------- the command


def run(tmp_path: Path, *words: str) -> tuple[int, list[Path]]:
    flags = ["demo", "--data", "demo", "--device", "cpu", "--tune-out", str(tmp_path)]
    return tune.main([*flags, *words]), sorted(tmp_path.glob("*.json"))


@pytest.mark.parametrize("loader", ["reference", "dali"])
def test_the_command_on_the_demo(
    loader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    words = ["--loader", loader, "--global-batch", "16", "--tune-seconds", "2"]
    code, files = run(tmp_path, *words, "--tune-rounds", "1", "--step-images-per-s", "100")
    assert code == 0 and len(files) == 1
    record = json.loads(files[0].read_text())
    settings = record["settings"]
    assert {row["loader"] for row in settings} == {loader}
    assert all(row["images_per_s"] > 0 and row["all"] for row in settings)
    best = {k: v for k, v in record["best"].items() if k != "flags"}
    assert best in [{k: v for k, v in row.items() if k != "all"} for row in settings]
    fastest = max(row["images_per_s"] for row in settings)
    assert record["cut_short"] or fastest <= tune_search.MARGIN * best["images_per_s"]
    assert record["loader_over_step"] == record["best"]["images_per_s"] / 100
    assert (record["micro_batch"], record["images"], record["device_type"]) == (16, 10_000, "cpu")
    assert 0.2 < record["image_kb"] < 2 and record["versions"]["torch"]
    shown = capsys.readouterr().out
    assert f"best: --loader {loader} --workers" in shown and f"written: {files[0]}" in shown
    assert "this is no verdict" in shown


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    record = {"device_type": "cpu"}
    paths = [tune_record.write_new(tmp_path, record, now=lambda: "2026-01-01") for _ in range(3)]
    assert [path.name for path in paths] == [
        "2026-01-01-cpu.json",
        "2026-01-01-cpu-2.json",
        "2026-01-01-cpu-3.json",
    ]


@pytest.mark.parametrize(
    ("rate", "told"),
    [(1300.0, "good: 1.30 times"), (1299.0, "too slow: 1.30 times"), (600.0, "too slow: 0.60")],
)
def test_the_verdict_on_a_gpu(rate: float, told: str) -> None:
    search = Search(lambda setting: rate, rounds=1, ends_s=FOREVER)
    search.fastest([START])
    record = {"device_type": "cuda", **tune_record.results(search, START, 1000.0)}
    assert tune_record.verdict(record).startswith(told)
    unknown = {"device_type": "cuda", **tune_record.results(search, START, None)}
    assert "--step-images-per-s" in tune_record.verdict(unknown)


def test_a_runs_rate_a_rank(tmp_path: Path) -> None:
    lines = [{"step": s, "images_per_s": r} for s, r in ((1, 10.0), (2, 80.0), (3, 90.0), (4, 85))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="no checkpoint yet: give --step-images-per-s"):
        tune.step_rate_of(tmp_path)
    saved = tmp_path / "checkpoints" / "step-00000004"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"format": 1, "step": 4, "world_size": 5}))
    (saved / ".metadata").touch()
    (tmp_path / "checkpoints" / "latest").write_text(saved.name)
    assert tune.step_rate_of(tmp_path) == 85 / 5  # the first line, with its start-up, is left out
    with pytest.raises(ValueError, match=r"holds no metrics.jsonl"):
        tune.step_rate_of(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tune-rounds", "0"], "--tune-rounds must be positive, got 0"),
        (["--tune-seconds", "nan"], "--tune-seconds must be positive, got nan"),
        (["--step-images-per-s", "1", "--tune-run", "x"], "not allowed with argument"),
        (["--hw-decoder-load", "1.5"], "--hw-decoder-load must be a share, 0 to 1, got 1.5"),
    ],
)
def test_wrong_flags_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plan_or_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--plan") == (2, [])
    assert run(tmp_path, "--tune-run", str(tmp_path)) == (2, [])
    assert "holds no metrics.jsonl" in capsys.readouterr().err


# ---------------------------------------------------------------- the share reaches the decoder


def test_the_share_reaches_dali(monkeypatch: Any, photos: Path) -> None:
    pytest.importorskip("nvidia.dali")
    asked: dict[str, Any] = {}
    build = dali_pipeline.build_pipeline

    def spy(*args: Any, **options: Any) -> Any:
        asked.update(options)
        return build(*args, **options)

    monkeypatch.setattr(dali_module, "build_pipeline", spy)
    source = open_source(photos)
    plan = PlanSpec(mask=MaskSpec(grid=(4, 4), target=6, min_block=2))
    views, schedule = ViewSpec(size=(32, 32), token_size=(16, 16)), BatchSchedule(24, 8, 0)
    options: Any = {"seed": 0, "total_steps": 1, "workers": 0, "backend": "dali"}
    with make_loader(source, plan, views, schedule, hw_decoder_load=0.8, **options) as loader:
        next(loader)
    assert asked["hw_decoder_load"] == 0.8
    with pytest.raises(ValueError, match=r"hw_decoder_load must be a share, 0 to 1, got -0\.1"):
        make_loader(source, plan, views, schedule, hw_decoder_load=-0.1, **options)

    decoder: dict[str, Any] = {}
    monkeypatch.setattr(dali_pipeline.fn, "external_source", lambda **_: None)
    monkeypatch.setattr(
        dali_pipeline.fn.decoders, "image", lambda _, **given: decoder.update(given)
    )
    dali_pipeline._decode(0, 0.8)
    assert (decoder["device"], decoder["hw_decoder_load"]) == ("mixed", 0.8)
    decoder.clear()
    dali_pipeline._decode(None, 0.8)
    assert decoder["device"] == "cpu" and "hw_decoder_load" not in decoder


def test_a_run_from_before_the_flag_still_resumes() -> None:
    config = load_recipe("beit-base-in1k")
    content = config_to_dict(config)
    assert content["data"].pop("hw_decoder_load") == dali_pipeline.HW_DECODER_LOAD == 0.65
    assert diff_configs(config_from_dict(content), config) == []
