"""The command that tunes the loader, and the hardware decoder's share on its way to DALI."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
from fastbeit.data.backend import HW_DECODER_LOAD
from fastbeit.data.tune_search import Search, Setting
from fastbeit.data.views import ViewSpec
from fastbeit.recipes import load_recipe
from fastbeit.training.config_io import config_from_dict, config_to_dict, diff_configs

START = Setting("dali", 1, 1, 0.6)


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
    search = Search(lambda setting: rate, rounds=1, ends_s=float("inf"))
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
    waiting = [{**line, "data_wait_share": 0.75} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in waiting))
    assert tune.step_rate_of(tmp_path) == 4 * 85 / 5  # what the step alone would do
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
    assert content["data"].pop("hw_decoder_load") == HW_DECODER_LOAD == 0.65
    assert diff_configs(config_from_dict(content), config) == []
