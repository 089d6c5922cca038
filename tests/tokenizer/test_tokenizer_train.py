"""Training a tokenizer by its command: outcome, reproducibility, refusals, help."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastbeit.tokenizer import load_tokenizer, train
from fastbeit.tokenizer.train_config import TrainConfig
from fastbeit.tokenizer.training_data import Subset, open_sources


def write_images(folder: Path, count: int, side: int = 24) -> Path:
    """Squares of two colours on a ground, placed by number: easy to learn, not constant."""
    for number in range(count):
        picture = Image.new("RGB", (side, side), (20, 20, 40))
        corner = (number * 5 % (side // 2), number * 7 % (side // 2))
        colour = (250, 200, 30) if number % 2 else (40, 220, 250)
        picture.paste(colour, (*corner, corner[0] + side // 2, corner[1] + side // 2))
        (folder / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number % 3}" / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 120)


@pytest.fixture
def config(folder, tmp_path) -> TrainConfig:
    return TrainConfig(
        data=str(folder),
        out=tmp_path / "tokenizer.safetensors",
        image_px=16,
        codes=32,
        widths=(8, 16),
        blocks_per_group=1,
        kernel=3,
        code_width=8,
        steps=60,
        batch=16,
        lr=5e-3,
        warmup_steps=5,
        revive_every=10,
        log_every=20,
        save_every=40,
        device="cpu",
        loader="reference",
        workers=0,
    )


def test_the_command_trains_and_writes_what_it_says(config, capsys):
    words = [f"--data={config.data}", f"--out={config.out}", "--image-px=16", "--codes=32"]
    words += ["--widths", "8", "16", "--blocks-per-group=1", "--kernel=3", "--code-width=8"]
    words += ["--steps=100", "--batch=16", "--lr=1e-2", "--warmup-steps=5", "--revive-every=10"]
    words += ["--log-every=20", "--save-every=40", "--device=cpu", "--loader=reference"]
    words += ["--workers=0", "--store=fp16"]
    assert train.main(words) == 0
    printed = capsys.readouterr().out
    for word in ("codebook_used=", "codebook_perplexity=", "temperature=", "codes_revived="):
        assert printed.count(word) == 5
    metrics_file = config.out.with_suffix(".jsonl").read_text()
    lines = [json.loads(line) for line in metrics_file.splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 40, 60, 80, 80, 100, 100]
    metrics = [line for line in lines if "loss_nats" in line]
    checks = [line for line in lines if "validation_mse" in line]
    assert metrics[-1]["reconstruction_nats"] < 0.5 * metrics[0]["reconstruction_nats"]
    assert checks[-1]["validation_psnr_db"] > checks[0]["validation_psnr_db"] + 1
    assert metrics[0]["temperature"] > metrics[1]["temperature"] > metrics[2]["temperature"]
    assert metrics[-1]["temperature"] == 1 / 16
    assert metrics[-1]["kl_weight"] == 0.1
    about = load_tokenizer(config.out).describe()
    assert about["command"].startswith("python -m fastbeit.tokenizer.train --data")
    assert "--codes=32" in about["command"]
    assert about["steps"] == 100 and about["training_images"] == 114
    assert about["validation"]["mse"] == checks[-1]["validation_mse"]
    assert about["train_tokens"]["codes_used"] >= 2
    assert about["sha256"] in printed


def test_the_same_seed_gives_the_same_file(config, tmp_path):
    short = replace(config, steps=12, log_every=6)
    digests = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train.train(replace(short, out=tmp_path / f"{name}.safetensors", seed=seed))
        digests[name] = load_tokenizer(tmp_path / f"{name}.safetensors").describe()["sha256"]
    assert digests["a"] == digests["b"] != digests["c"]


def test_the_saved_tokenizer_gives_the_measured_error(config):
    measured = train.train(replace(config, steps=20))
    tokenizer = load_tokenizer(config.out)
    _, validation = open_sources(config)
    assert len(validation) == 6
    pixels = []
    for row in range(len(validation)):
        picture = Image.open(validation.name(row)).convert("RGB").resize((16, 16), Image.LANCZOS)
        values = torch.tensor(list(picture.tobytes()), dtype=torch.float32)
        pixels.append(values.view(16, 16, 3).permute(2, 0, 1) / 255)
    images = torch.stack(pixels)
    codes = tokenizer.encode(images * tokenizer.pixel_scale + tokenizer.pixel_offset)
    mse = float((tokenizer.decode(codes.view(-1, 8, 8)) - images).square().mean())
    assert measured["mse"] == pytest.approx(mse, rel=1e-4)
    assert measured["psnr_db"] == pytest.approx(-10 * math.log10(mse), rel=1e-4)


def test_a_diverged_run_keeps_the_last_good_file(config, capsys):
    train.train(replace(config, steps=10))
    good = config.out.read_bytes()
    with pytest.raises(FloatingPointError, match="lower --lr"):
        train.train(replace(config, steps=20, lr=1e30, clip=1e30, log_every=1))
    assert config.out.read_bytes() == good


def test_held_out_images_are_disjoint(config, folder):
    training, validation = open_sources(config)
    names = [{s.name(i) for i in range(len(s))} for s in (training, validation)]
    assert len(names[0]) + len(names[1]) == 120 and not names[0] & names[1]
    assert training.read(0) == Path(training.name(0)).read_bytes()
    assert isinstance(training, Subset)
    assert training.labels is not None and len(training.labels) == len(training)
    assert training.classes == ["0", "1", "2"]
    assert training.fingerprint != validation.fingerprint


def test_demo_uses_its_own_splits(config):
    training, validation = open_sources(replace(config, data="demo", image_px=28))
    assert (len(training), len(validation)) == (10_000, 1_200)
    assert "train-000000.tar" in training.name(0)
    assert "validation-000000.tar" in validation.name(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_px": 1}, "smaller than one token of 2 x 2 pixels: give at least 2"),
        ({"image_px": 15}, "multiple of the token's 2 pixels, got 15: give 14 or 16"),
        ({"codes": 9000}, "at most 8192, got 9000"),
        ({"codes": 8000}, "114 images of 64 tokens can't fill 8000 codes"),
        ({"batch": 115}, "114 images to train on, fewer than one batch of 115"),
        ({"out": Path("x.pt")}, r"must end in .safetensors, got x.pt"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"temperature": (1.0, 0.0)}, "--temperature must be positive"),
        ({"lr": 0.0}, "lr > 0"),
        ({"dead_share": 2.0}, "--dead-share must be in"),
        ({"kernel": 2}, "kernel must be odd"),
        ({"data": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
        ({"device": "quantum"}, "--device must be auto, cpu or cuda"),
    ],
)
def test_what_cannot_work_is_refused_before_training(change, message, config):
    with pytest.raises(ValueError, match=message):
        train.train(replace(config, **change))
    assert not config.out.exists()


def test_small_and_few_images_are_refused(config, tmp_path):
    few = write_images(tmp_path / "few", 16)
    with pytest.raises(ValueError, match="no image is left for validation"):
        train.train(replace(config, data=str(few)))
    tiny = write_images(tmp_path / "tiny", 40, side=3)
    with pytest.raises(
        ValueError, match=r"smaller than one token of 4 x 4 pixels, such as .*3 x 3"
    ):
        train.train(replace(config, data=str(tiny), widths=(8, 8, 8)))


def test_bad_settings_end_with_exit_code_2(config, capsys):
    assert train.main([f"--data={config.data}", "--out=x.pt"]) == 2
    assert "--out must end in .safetensors" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        train.main([f"--data={config.data}", f"--out={config.out}", "--temprature", "1", "0.1"])
    assert ended.value.code == 2
    assert "--temperature" in capsys.readouterr().err


def test_help_says_units_and_formulas(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for needed in ("--data PATH", "--out FILE.safetensors", "--image-px PX", "cos(pi s / S)",
                   "R + beta KL / (channels * stride^2)", "--codes COUNT", "dead"):  # fmt: skip
        assert needed in text
