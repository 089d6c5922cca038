"""Tokenizer files: round trip, hash, refusals that name the cause, atomic saves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastbeit.tokenizer import DvaeConfig, files, load_tokenizer
from fastbeit.tokenizer.dvae import Decoder, Encoder, initialise
from fastbeit.tokenizer.files import save_tokenizer, tensors_sha256

CONFIG = DvaeConfig(channels=1, codes=32, widths=(8, 16), code_width=8, likelihood="mse")


@pytest.fixture
def networks() -> tuple[Encoder, Decoder]:
    pair = Encoder(CONFIG), Decoder(CONFIG)
    for network in pair:
        initialise(network, torch.Generator().manual_seed(0))
    return pair


def test_round_trip(tmp_path, networks):
    path = tmp_path / "folder" / "tokenizer.safetensors"
    digest = save_tokenizer(path, *networks, origin={"made_by": "a test"})
    tokenizer = load_tokenizer(path)
    assert tokenizer.config == CONFIG
    about = tokenizer.describe()
    assert (about["sha256"], about["made_by"]) == (digest, "a test")
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected = networks[0](images).argmax(1)
    assert torch.equal(tokenizer.encode(images), expected.flatten(1))
    rebuilt = networks[1].pixels(networks[1].from_embeddings(networks[1].embed(expected)))
    torch.testing.assert_close(tokenizer.decode(expected), rebuilt.detach(), rtol=0, atol=1e-6)
    assert (tokenizer.vocab_size, tokenizer.stride, tokenizer.channels) == (32, 2, 1)
    assert (tokenizer.pixel_scale, tokenizer.pixel_offset, tokenizer.resample) == (
        0.8,
        0.1,
        "lanczos",
    )
    half = load_tokenizer(str(path), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_half_precision_file_without_decoder(tmp_path, networks):
    path = tmp_path / "t.safetensors"
    save_tokenizer(path, networks[0], origin={}, dtype=torch.float16)
    tokenizer = load_tokenizer(path)
    assert tokenizer.decoder is None
    assert {p.dtype for p in tokenizer.parameters()} == {torch.float32}
    torch.testing.assert_close(tokenizer.encoder.head.w, networks[0].head.w, rtol=1e-3, atol=1e-4)


def test_content_hash_sees_every_part():
    base = {"a": torch.arange(4.0), "b": torch.ones(2)}
    reference = tensors_sha256(base)
    assert tensors_sha256(dict(reversed(base.items()))) == reference
    changed = [
        {**base, "a": base["a"].view(2, 2)},
        {**base, "a": torch.tensor([0.0, 1.0, 2.0, 3.0000002])},
        {**base, "b": torch.ones(2, dtype=torch.float64)},
        {"c": base["a"], "b": base["b"]},
    ]
    assert len({reference, *map(tensors_sha256, changed)}) == 5


def test_a_flipped_bit_is_noticed(tmp_path, networks):
    path = tmp_path / "t.safetensors"
    save_tokenizer(path, *networks, origin={})
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its tensors' sha256"):
        load_tokenizer(path)


def rewrite(path: Path, *, tensors=None, **metadata) -> None:
    with safe_open(path, "pt") as file:
        kept = file.metadata()
    new = load_file(path) if tensors is None else tensors
    save_file(new, path, {**kept, "sha256": tensors_sha256(new), **metadata})


def test_wrong_tensors_are_named(tmp_path, networks):
    path = tmp_path / "t.safetensors"
    save_tokenizer(path, *networks, origin={})
    tensors = load_file(path)
    del tensors["encoder.blocks.input.w"]
    tensors["decoder.extra"] = torch.ones(1)
    tensors["encoder.blocks.input.b"] = torch.ones(3)
    rewrite(path, tensors=tensors)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(path)
    text = str(caught.value)
    assert "1 missing: encoder.blocks.input.w" in text
    assert "1 unexpected: decoder.extra" in text
    assert "encoder.blocks.input.b is [3], expected [8]" in text


def test_unknown_settings_are_named(tmp_path, networks):
    path = tmp_path / "t.safetensors"
    save_tokenizer(path, *networks, origin={})
    rewrite(path, config=json.dumps({**CONFIG.to_dict(), "quantiser": "vq"}))
    with pytest.raises(ValueError, match=r"unknown tokenizer settings.*quantiser"):
        load_tokenizer(path)
    rewrite(path, config="{")
    with pytest.raises(ValueError, match="unreadable tokenizer settings"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
        (b"", "an empty file"),
        (bytes(1000), "zero bytes only"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "a pickle.*tokenizer.convert"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ((1 << 20).to_bytes(8, "little") + b'{"a":', "ends inside its header"),
        (b"hello\nworld", "a text file that begins 'hello'"),
    ],
)
def test_what_is_no_safetensors_is_named(tmp_path, content, message):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_foreign_safetensors_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="no tokenizer file: its metadata lacks format"):
        load_tokenizer(path)


def test_a_missing_path_says_what_is_possible(tmp_path):
    with pytest.raises(ValueError, match="expected 'dall-e', 'demo' or the path"):
        load_tokenizer(tmp_path / "none.safetensors")


def test_dall_e_absent_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTBEIT_TOKENIZER", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError) as caught:
        load_tokenizer("dall-e")
    text = str(caught.value)
    destination = tmp_path / "fastbeit" / "dall_e.safetensors"
    for needed in (
        "wget -O encoder.pkl https://cdn.openai.com/dall-e/encoder.pkl",
        "wget -O decoder.pkl https://cdn.openai.com/dall-e/decoder.pkl",
        f"python -m fastbeit.tokenizer.convert encoder.pkl decoder.pkl {destination}",
        "wget -o",
        "conversationhub.blob.core.windows.net is dead",
        "FASTBEIT_TOKENIZER",
    ):
        assert needed in text
    monkeypatch.setenv("FASTBEIT_TOKENIZER", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"FASTBEIT_TOKENIZER names .*nowhere, which is no file"):
        load_tokenizer("dall-e")


def test_another_tokenizer_is_not_taken_for_dall_e(tmp_path, networks, monkeypatch):
    path = tmp_path / "fastbeit" / "dall_e.safetensors"
    save_tokenizer(path, *networks, origin={})
    monkeypatch.delenv("FASTBEIT_TOKENIZER", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"not DALL-E's .32 codes, stride 2"):
        load_tokenizer("dall-e")
    monkeypatch.setattr(files, "DALL_E", CONFIG)  # as if it were the published size
    assert load_tokenizer("dall-e").vocab_size == 32
    other = tmp_path / "other.safetensors"
    save_tokenizer(other, networks[0], origin={"made_by": "other"})
    monkeypatch.setenv("FASTBEIT_TOKENIZER", str(other))
    assert load_tokenizer("dall-e").describe()["made_by"] == "other"


def test_a_failed_save_leaves_the_previous_file(tmp_path, networks, monkeypatch):
    path = tmp_path / "t.safetensors"
    save_tokenizer(path, *networks, origin={"made_by": "first"})

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_tokenizer(path, *networks, origin={"made_by": "second"})
    assert load_tokenizer(path).describe()["made_by"] == "first"
    assert os.listdir(tmp_path) == ["t.safetensors"]
