"""``config.json``: exact round trips, strict reading, atomic writing, comparing by effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastbeit.recipes import RECIPES, load_recipe
from fastbeit.training.config import PretrainConfig
from fastbeit.training.config_io import (
    WITHOUT_EFFECT,
    config_to_dict,
    diff_configs,
    load_config,
    save_config,
)


def changed(config: PretrainConfig, name: str, value: Any) -> PretrainConfig:
    """``config`` with the field called "part.field" changed."""
    part, _, field = name.partition(".")
    if not field:
        return replace(config, **{part: value})
    return replace(config, **{part: replace(getattr(config, part), **{field: value})})


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_the_file(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert load_config(tmp_path) == config, "a run folder is accepted too"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_paths_pairs_and_awkward_floats_survive_with_their_types(tmp_path: Path) -> None:
    config = load_recipe("beit-base-in1k")
    config = changed(config, "run.run_dir", tmp_path / "run")
    config = changed(config, "model.image_size", (96, 160))
    config = changed(config, "optimizer.lr", 0.1 + 0.2)
    config = changed(config, "optimizer.warmup_epochs", 3.0)
    save_config(config, tmp_path / "config.json")
    back = load_config(tmp_path / "config.json")
    assert back == config
    assert isinstance(back.run.run_dir, Path)
    assert back.model.image_size == (96, 160)
    assert type(back.optimizer.warmup_epochs) is float
    assert type(back.data.crop_scale) is tuple


def test_the_same_configuration_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        save_config(load_recipe("demo"), tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    content = json.loads((tmp_path / "a.json").read_text())
    assert content.pop("fastbeit_version")
    assert content == config_to_dict(load_recipe("demo"))


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("optimizer", "learning_rat", 1.0, r"unknown key optimizer.learning_rat: it has"),
        ("optimizer", "weight_decai", 1.0, r"did you mean optimizer.weight_decay\?"),
        ("optimizer", "lr", "fast", r'optimizer.lr must be a number, got "fast"'),
        ("optimizer", "lr", True, r"optimizer.lr must be a number, got true"),
        ("optimizer", "betas", [0.9], r"optimizer.betas must be a list of 2 values, got \[0.9\]"),
        ("optimizer", "betas", [0.9, "b"], r"optimizer.betas\[1\] must be a number"),
        ("run", "steps", 1.5, r"run.steps must be an integer or null, got 1.5"),
        ("run", "global_batch", True, r"run.global_batch must be an integer, got true"),
        (
            "run",
            "precision",
            "fp8",
            r"run.precision must be one of 'bf16', 'fp32', 'auto', got \"fp8\"",
        ),
        ("run", "compile", True, r"run.compile must be one of 'auto', 'on', 'off', got true"),
        ("run", "wandb", 1, r"run.wandb must be true or false, got 1"),
        ("data", "mean", 0.5, r"data.mean must be a list of a number, got 0.5"),
        ("model", "heads", 7, r"heads must divide width"),
    ],
)
def test_a_wrong_file_is_refused_by_key(
    part: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    save_config(load_recipe("beit-base-in1k"), path)
    content = json.loads(path.read_text())
    content[part][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not found</html>", r"is not a configuration in JSON"),
        (b"\xff\xfe", r"is not a configuration in JSON"),
        (b"[1, 2]", r"must hold a JSON object, got \[1, 2\]"),
        (b'{"model": 3}', r"model must be an object, got 3"),
        (b'{"recipe": "a", "recipe": "b"}', r"the key 'recipe' stands twice"),
        (b'{"modle": {}}', r"unknown key modle: did you mean model\?"),
    ],
)
def test_what_is_no_configuration_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_config(path)
    with pytest.raises(ValueError, match="does not exist: expected a run folder"):
        load_config(tmp_path / "elsewhere.json")


def test_the_file_is_replaced_and_never_written_over(tmp_path: Path) -> None:
    path, old = tmp_path / "config.json", tmp_path / "old.json"
    save_config(load_recipe("demo"), path)
    old.hardlink_to(path)  # what somebody who is reading it holds
    save_config(load_recipe("smoke"), path)
    assert (load_config(old).recipe, load_config(path).recipe) == ("demo", "smoke")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save_config(load_recipe("demo"), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):  # NaN is no JSON: fails halfway through
        save_config(changed(load_recipe("demo"), "run.stall_minutes", float("nan")), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_differences_are_named_with_both_values() -> None:
    before = load_recipe("beit-base-in1k")
    after = changed(changed(before, "optimizer.lr", 2e-3), "model.layer_scale", None)
    assert diff_configs(before, before) == []
    assert diff_configs(before, after) == [
        "optimizer.lr: 0.0015 -> 0.002",
        "model.layer_scale: 0.1 -> None",
    ]


def test_what_does_not_change_the_result_may_differ() -> None:
    before = load_recipe("demo")
    after = replace(
        before,
        recipe="other",
        run=replace(
            before.run, run_dir=Path("x"), stop_after=3, log_every=1, micro_batch=4, shard="zero3"
        ),
        data=replace(before.data, workers=7),
    )
    assert diff_configs(before, after) == []
    for name, value in [("run.seed", 1), ("run.precision", "bf16"), ("data.loader", "dali")]:
        assert len(diff_configs(before, changed(before, name, value))) == 1


def test_every_field_called_harmless_exists() -> None:
    known = set()
    for part, value in config_to_dict(load_recipe("demo")).items():
        known |= {f"{part}.{key}" for key in value} if isinstance(value, dict) else {part}
    assert known >= WITHOUT_EFFECT
