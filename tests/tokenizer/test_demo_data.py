"""The demo images and tokenizer that come with the package, and the script that cut the images."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastbeit
from fastbeit.tokenizer import load_tokenizer
from fastbeit.tokenizer.files import DEMO_PATH
from fastbeit.tokenizer.statistics import token_statistics

FOLDER = Path(fastbeit.__file__).parent / "data" / "demo"
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_demo_data.py"
SPLITS = {"train": 1000, "validation": 120, "test": 120}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_demo_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def members() -> dict[str, list[tuple[tarfile.TarInfo, bytes]]]:
    found = {}
    for split in SPLITS:
        with tarfile.open(FOLDER / f"{split}-000000.tar") as tar:
            found[split] = [(m, tar.extractfile(m).read()) for m in tar]
    return found


def pixels(members, split: str, count: int) -> np.ndarray:
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(data))) for _, data in members[split][:count]]
    )


def test_tars_are_small_balanced_disjoint_and_neutral(members, script):
    assert sum(path.stat().st_size for path in FOLDER.glob("*.tar")) <= 16_000_000
    names = [info.name for split in SPLITS for info, _ in members[split]]
    assert len(set(names)) == len(names) == 12_400
    for split, per_class in SPLITS.items():
        classes = Counter(info.name.split("/")[0] for info, _ in members[split])
        assert classes == dict.fromkeys(script.CLASSES, per_class)
        source = "t10k" if split == "test" else "train"
        assert all(info.name.split("/")[1].startswith(f"{source}-") for info, _ in members[split])
        for info, _ in members[split]:
            assert (info.mtime, info.uid, info.gid, info.uname, info.isreg()) == (0, 0, 0, "", True)
        # Mixed order, so that reading a tar front to back is not reading class by class.
        head = [info.name.split("/")[0] for info, _ in members[split][:100]]
        assert len(set(head)) == 10


def test_images_are_28_px_grey_and_occur_once(members):
    seen = set()
    for split in SPLITS:
        images = pixels(members, split, 1200)
        assert images.shape == (1200, 28, 28) and images.dtype == np.uint8
        assert 50 < images.mean() < 100
        seen |= {(split, image.tobytes()) for image in images}
    assert len({image for _, image in seen}) == 3600


def test_licence_and_citation_are_there():
    assert "MIT License" in (FOLDER / "LICENSE").read_text()
    assert "Zalando" in (FOLDER / "LICENSE").read_text()
    assert "1708.07747" in (FOLDER / "CITATION.bib").read_text()


def test_the_encoder_of_the_script_is_lossless(script):
    generator = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(28), 3 * np.arange(28)).astype(np.uint8)
    noise = generator.integers(0, 256, (28, 28), dtype=np.uint8)
    for image in (smooth, noise, np.zeros((5, 9), np.uint8)):
        with Image.open(io.BytesIO(script.encode_png(image))) as picture:
            assert picture.mode == "L"
            assert np.array_equal(np.asarray(picture), image)
    assert len(script.encode_png(smooth)) < 200 < len(script.encode_png(noise))


def test_the_script_cuts_disjoint_balanced_splits_and_repeats_itself(script, tmp_path):
    labels = np.arange(400) % 10
    cuts = {"train": 20, "validation": 5}
    chosen = script.choose(labels, "train", cuts)
    assert chosen == script.choose(labels, "train", cuts)
    rows = {split: [row for _, row in chosen[split]] for split in cuts}
    assert not set(rows["train"]) & set(rows["validation"])
    for split, per_class in cuts.items():
        assert np.bincount(labels[rows[split]]).tolist() == [per_class] * 10
        assert all(
            name == f"{script.CLASSES[labels[row]]}/train-{row:05d}.png"
            for name, row in chosen[split]
        )
    images = np.random.default_rng(1).integers(0, 9, (400, 28, 28), dtype=np.uint8)
    for name in ("a.tar", "b.tar"):
        script.write_tar(tmp_path / name, chosen["validation"], images)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_the_script_refuses_other_files(script, tmp_path, capsys):
    assert script.main([str(tmp_path)]) == 2
    assert "train-images-idx3-ubyte.gz, which does not exist" in capsys.readouterr().err
    import gzip

    for name in script.SHA256:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x01\x05"))
    assert script.main([str(tmp_path)]) == 2
    assert "unpacked sha256 is" in capsys.readouterr().err


def test_the_demo_tokenizer_is_what_the_demo_needs(members):
    assert DEMO_PATH.stat().st_size <= 2_000_000
    tokenizer = load_tokenizer("demo")
    assert (tokenizer.vocab_size, tokenizer.stride, tokenizer.channels) == (256, 4, 3)
    command = tokenizer.describe()["command"]
    assert command.startswith("python -m fastbeit.tokenizer.train --data demo --out")
    test = torch.from_numpy(pixels(members, "test", 400)).float()[:, None] / 255
    images = test.expand(-1, 3, -1, -1)
    mapped = images * tokenizer.pixel_scale + tokenizer.pixel_offset
    codes = tokenizer.encode(mapped).view(-1, 7, 7)
    psnr_db = -10 * float((tokenizer.decode(codes) - images).square().mean().log10())
    assert psnr_db > 19.0
    train = torch.from_numpy(pixels(members, "train", 3000)).float()[:, None] / 255
    mapped = train.expand(-1, 3, -1, -1) * tokenizer.pixel_scale + tokenizer.pixel_offset
    found = token_statistics(tokenizer.encode(mapped), 256)
    assert found.codes_used >= 0.6 * 256
    assert found.perplexity > 40
    assert found.best_position_guess < 0.4
