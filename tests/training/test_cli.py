"""The command line: recipes, flags, files, refusals, and who speaks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastbeit import cli
from fastbeit.recipes import RECIPES, load_recipe
from fastbeit.training.config_io import save_config


@pytest.fixture(autouse=True)
def alone_on_one_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def refusal(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said on stderr when ``words`` are refused with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        cli.parse(words.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


# ---------------------------------------------------------------- what works


def test_nothing_at_all_is_the_demo() -> None:
    assert cli.parse([]) == cli.Command(load_recipe("demo"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_alone_is_that_recipe(name: str) -> None:
    assert cli.parse([name, "--data", "demo"]).config == replace(
        load_recipe(name), data=replace(load_recipe(name).data, data="demo")
    )


def test_flags_are_flat_but_for_model_and_mask() -> None:
    words = (
        "beit-base-in1k --data some/folder --lr 2e-3 --global-batch 1024 --micro-batch 32 "
        "--crop-scale 0.2 1 --mean 0.5 0.4 0.3 --run-dir out/run --precision fp32 --shard zero2 "
        "--no-evaluate --compile on --model.width 384 --model.heads=6 --model.image-size 192 256 "
        "--model.layer-scale None --mask.target 60 --tokenizer my.safetensors --betas 0.9 0.98"
    )
    config = cli.parse(words.split()).config
    assert (config.data.data, config.optimizer.lr) == ("some/folder", 2e-3)
    assert (config.run.global_batch, config.run.micro_batch) == (1024, 32)
    assert (config.data.crop_scale, config.data.mean) == ((0.2, 1.0), (0.5, 0.4, 0.3))
    assert (config.run_dir, config.run.precision) == (Path("out/run"), "fp32")
    assert (config.run.shard, config.run.evaluate, config.run.compile) == ("zero2", False, "on")
    assert (config.model.width, config.model.heads, config.model.grid) == (384, 6, (12, 16))
    assert (config.model.layer_scale, config.mask.target) == (None, 60)
    assert (config.tokenizer.tokenizer, config.optimizer.betas) == ("my.safetensors", (0.9, 0.98))
    # and what no flag named is still the recipe's
    assert (config.optimizer.clip_norm, config.mask.min_block) == (3.0, 16)


def test_underscores_do_as_well() -> None:
    assert cli.parse(["--global_batch", "64"]).config.run.global_batch == 64


def test_a_length_in_epochs_replaces_the_recipes_steps() -> None:
    assert load_recipe("smoke").run.steps is not None
    config = cli.parse(["smoke", "--epochs", "2", "--warmup-epochs=0.1"]).config
    assert (config.run.steps, config.run.epochs) == (None, 2.0)
    assert (config.optimizer.warmup_steps, config.optimizer.warmup_epochs) == (None, 0.1)
    kept = cli.parse(["smoke", "--steps", "9"]).config
    assert (kept.run.steps, kept.optimizer.warmup_steps) == (9, 5)


def test_a_run_folder_comes_back_and_flags_still_override(tmp_path: Path) -> None:
    config = replace(load_recipe("smoke"), mask=replace(load_recipe("smoke").mask, target=11))
    save_config(config, tmp_path / "config.json")
    assert cli.parse(["--config", str(tmp_path)]).config == config
    changed = cli.parse([f"--config={tmp_path}/config.json", "--lr", "0.5"]).config
    assert changed == replace(config, optimizer=replace(config.optimizer, lr=0.5))


def test_the_plan_needs_no_data_and_takes_torchruns_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    command = cli.parse("beit-base-in1k --plan --gpus 8 --images-per-s 250".split())
    assert (command.plan, command.gpus, command.images_per_s) == (True, 8, 250.0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.parse(["--plan"]).gpus == 4


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        ("--global-bath 3", "--global-batch"),
        ("--model.widht 3", "--model.width"),
        ("smoke --warmup-step 3", "--warmup-steps"),
        ("--mask.min-blok 3", "--mask.min-block"),
        ("--image-size 32", "--model.image-size"),
        ("beit-base", "did you mean beit-base-in1k?"),
        ("--steps 3 smoke", "The recipe comes first: python -m fastbeit.pretrain smoke"),
    ],
)
def test_unknown_words_are_refused_with_the_nearest(
    words: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nearest in refusal(words, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr fast", "--lr: could not convert string to float: 'fast'"),
        ("--lr -1", "error: --lr must be positive, got -1.0"),
        ("--precision fp8", "fp8"),
        ("--betas 0.9", "--betas"),
        ("--recipe other", "--recipe"),
        ("--mask.target 80", "use --mask.target 20 for 40 %"),
        ("--model.heads 7", "heads must divide width 128, got 7 heads"),
        ("--model.image-size 30", "image_size must be a multiple of patch_size 4"),
        ("--epochs 3 --steps 4", "--epochs and --steps exclude each other"),
        ("--warmup-steps=3 --warmup-epochs 4", "--warmup-epochs and --warmup-steps exclude"),
        ("beit-base-in1k", "no images given: use --data DIR"),
        ("--config nowhere.json", "nowhere.json does not exist: expected a run folder"),
        ("smoke --config x", "--config x and the recipe smoke exclude each other"),
        ("--gpus 2", "--gpus only goes with --plan (torchrun --nproc-per-node sets the ranks)"),
        ("--images-per-s 2", "--images-per-s only goes with --plan"),
        ("--plan --gpus 0", "--gpus must be at least 1, got 0"),
        ("--plan --images-per-s -3", "--images-per-s must be positive"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(words, capsys)
    assert message in said
    assert "--help" in said


def test_a_damaged_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"optimizer": {"lrr": 1}}')
    assert "did you mean optimizer.lr?" in refusal(f"--config {tmp_path}", capsys)


# ---------------------------------------------------------------- what is said


def test_help_shows_recipes_groups_units_and_the_recipes_own_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(["beit-large-in1k", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert name in text
        assert recipe.SUMMARY in text
    for group in ("command", "data", "run", "optimizer", "tokenizer", "mask", "model"):
        assert f" {group} options " in text
    for shown in (
        "--global-batch IMAGES",
        "--warmup-steps STEPS",
        "--crop-scale MIN_SHARE MAX_SHARE",
        "--mask.target PATCHES",
        "--stall-minutes MINUTES",
        "(default: 1e-05)",
    ):
        assert shown in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any("--clip-norm NORM" in line and "(default: 1.0)" in line for line in lines)
    assert "--recipe " not in text


def test_every_flag_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    entries = re.split(r"^.? +--(?=[a-z])", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    assert len(entries) > 50
    for entry in entries:
        words = " ".join(line.strip("│ -") for line in entry.splitlines())
        explanation = words.split("(default:")[0].split()
        assert len(explanation) > 3, f"--{words}"


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(["--list-recipes"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)


@pytest.mark.parametrize("words", ["--help", "--list-recipes", "--lr -1", "--lrr 1", "nothing"])
def test_only_rank_0_speaks(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "GRACE_S", 0.0)
    with pytest.raises(SystemExit):
        cli.parse(words.split())
    assert capsys.readouterr() == ("", "")


def test_silent_ranks_let_rank_0_speak_first(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_s: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited_s.append)
    for rank, words in (("0", ["--lr", "-1"]), ("1", ["--help"]), ("1", ["--lr", "-1"])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            cli.parse(words)
    assert waited_s == [cli.GRACE_S]


def test_a_plan_that_cannot_be_made_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.parse("beit-base-in1k --plan --gpus 7".split())
    with pytest.raises(SystemExit) as caught:
        cli.print_plan(command)
    assert caught.value.code == 2
    assert "cannot be split evenly over 7 ranks" in capsys.readouterr().err


def test_parsing_queries_no_gpu_and_loads_no_dali() -> None:
    code = (
        "import sys, torch\n"
        "def refuse(*_): raise AssertionError('a GPU was asked for')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = refuse\n"
        "from fastbeit import cli\n"
        "cli.parse(['smoke'])\n"
        "assert not {'nvidia.dali', 'xformers', 'apex'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ}, timeout=120)
