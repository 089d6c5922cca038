"""Stages of the GPU command: where it starts, and what they say when they can't run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu import suites, tuning

RunPython = Callable[..., subprocess.CompletedProcess[str]]


def test_it_starts_where_only_torch_and_triton_are(run_python: RunPython, repo_root: Path) -> None:
    """And its tasks, but for those that train a whole step, which say what is missing."""
    code = """
import sys
for name in ("tyro", "safetensors", "PIL", "rich", "timm", "transformers"):
    sys.modules[name] = None
import benchmarks.gpu.__main__, benchmarks.gpu.tasks as tasks
rows = []
class Events:
    row = rows.append
tasks.run({"kind": "replay", "dtype": "float32", "dry": True}, Events)
assert [row["status"] for row in rows] == ["skipped"], rows
assert "can't be imported" in rows[0]["reason"], rows
"""
    run_python("-c", code, env={"PYTHONPATH": f"{repo_root}:{repo_root / 'kernels'}"})


def test_suites_and_training_parse_no_flags(run_python: RunPython, repo_root: Path) -> None:
    """A GPU's machine may have torch and pytest, and nothing to install from."""
    names = [Path(name).stem for name in suites.FILES]
    code = f"""
import sys
sys.modules["tyro"] = None
import benchmarks.recorder, fastbeit.pretrain
from fastbeit.recipes import load_recipe
from fastbeit.training.config_io import config_from_dict, config_to_dict
import {", ".join(f"benchmarks.{name}" for name in names)}
config = load_recipe("beit-base-in1k")
assert config_from_dict(config_to_dict(config)) == config
try:
    fastbeit.pretrain.main(["--steps=3"])
except ModuleNotFoundError as error:
    assert "tyro" in str(error)
else:
    raise AssertionError("flags were parsed without a parser")
"""
    run_python("-c", code, env={"PYTHONPATH": f"{repo_root}:{repo_root / 'kernels'}"})


def test_suites_that_cannot_run_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(seconds: float = 100.0, only: tuple[str, ...] = ()) -> dict[str, object]:
        return suites.run_suites(tmp_path, seconds, {}, list(only), True)

    assert row(seconds=suites.LEAST_S - 1)["reason"] == "19 s were left"
    assert row(only=("LayerNorm",))["status"] == "skipped"
    assert suites.chosen([])[:2] == ["test_tokenizer.py", "test_step.py"]  # the most important
    assert suites.chosen(["residual", "test_model.py"]) == ["test_model.py"]
    monkeypatch.setattr(suites, "LEAST_S", 0.0)
    assert row(seconds=0.2, only=("test_plan.py", "test_step.py"))["status"] == "cut short"
    monkeypatch.setattr(suites.importlib.util, "find_spec", lambda name: None)
    assert row()["status"] == "unavailable"
    assert "pytest_benchmark" in str(row()["reason"])


def test_tuning_says_why_it_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MODULE", "json.no_such_module")
    assert tuning.tune(tmp_path, 100.0, {}, False)["status"] == "unavailable"
    monkeypatch.setattr(tuning, "MODULE", "json.tool")
    assert tuning.tune(tmp_path, 1.0, {}, False)["status"] == "skipped"
    assert tuning.tune(tmp_path, 100.0, {}, True)["status"] == "skipped"
    monkeypatch.setattr(tuning, "LEAST_S", 0.0)
    monkeypatch.setattr(tuning, "MODULE", "this")
    row = tuning.tune(tmp_path, 20.0, {}, False)
    assert row["status"] == "ok" and "Zen" in (tmp_path / "tuning.txt").read_text()
