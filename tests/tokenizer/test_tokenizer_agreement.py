"""Agreement of 16-bit tokens with fp32: counted right, margins of the disagreeing, the command."""

from __future__ import annotations

import json

import pytest
import torch

from fastbeit.tokenizer import agreement, load_tokenizer
from fastbeit.tokenizer.agreement import compare, rounded_features


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1


@pytest.mark.parametrize("arithmetic", ["device", "rounded"])
def test_counts_and_margins_are_those_of_the_tokens(arithmetic) -> None:
    tokenizer = load_tokenizer("demo")
    batches = [images_of(6), images_of(4, seed=1)]
    found = {a.precision: a for a in compare(tokenizer, batches, arithmetic=arithmetic)}
    assert set(found) == {"bf16", "fp16"}
    logits = torch.cat([tokenizer.logits(b).permute(0, 2, 3, 1).flatten(0, 2) for b in batches])
    exact = torch.cat([tokenizer.encode(b).flatten() for b in batches])
    for name, dtype in agreement.PRECISIONS.items():
        if arithmetic == "device":
            other = load_tokenizer("demo", dtype=dtype)
            tokens = torch.cat([other.encode(b).flatten() for b in batches])
            differ = tokens != exact
            margins = (logits.amax(1) - logits.gather(1, tokens[:, None])[:, 0])[differ]
            assert found[name].equal == int((~differ).sum())
            assert found[name].margin_max == pytest.approx(float(margins.max()))
            assert found[name].margin_median == pytest.approx(float(margins.median()))
        assert found[name].tokens == 10 * 49
        assert 0.9 < found[name].share < 1
        assert 0 < found[name].margin_median <= found[name].margin_max < 1
        assert found[name].not_finite == 0
        assert f"{100 * found[name].share:.2f} % of 490 tokens equal" in str(found[name])
    # Eight times finer rounding.
    assert found["fp16"].equal > found["bf16"].equal
    assert found["fp16"].margin_max < found["bf16"].margin_max


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_arithmetic_is_that_of_16_bits(dtype) -> None:
    """As near to the device's own as their roundings allow, and every number fits the format."""
    half, images = load_tokenizer("demo", dtype=dtype), images_of(2).to(dtype)
    rounded = rounded_features(load_tokenizer("demo", dtype=dtype).float().encoder, images, dtype)
    assert torch.equal(rounded, rounded.to(dtype).float())
    exact = load_tokenizer("demo").features(images_of(2))
    error = lambda x: float((x.float() - exact).norm() / exact.norm())  # noqa: E731
    assert error(rounded) == pytest.approx(error(half.features(images)), rel=0.2)


def test_what_does_not_fit_is_reported() -> None:
    """fp16 ends at 65,504."""
    tokenizer = load_tokenizer("demo")
    tokenizer.encoder.blocks["input"].w.mul_(1e5)
    bf16, fp16 = compare(tokenizer, [images_of(3)], arithmetic="rounded")
    assert bf16.not_finite == 0 and fp16.not_finite == 3
    assert "3 IMAGES NOT FINITE" in str(fp16) and "NOT FINITE" not in str(bf16)


def test_only_fp32_is_a_measure_and_nothing_is_no_agreement() -> None:
    with pytest.raises(ValueError, match=r"must be float32, got torch\.float16"):
        compare(load_tokenizer("demo", dtype=torch.float16), [images_of(1)])
    with pytest.raises(ValueError, match="no images"):
        compare(load_tokenizer("demo"), [])


def test_the_tokenizer_given_stays_as_it_was() -> None:
    tokenizer = load_tokenizer("demo")
    before = tokenizer.encode(images_of(2))
    compare(tokenizer, [images_of(1)])
    assert {p.dtype for p in tokenizer.parameters()} == {torch.float32}
    assert torch.equal(tokenizer.encode(images_of(2)), before)


def test_command(tmp_path, capsys) -> None:
    file = tmp_path / "figures.json"
    command = ["--tokenizer", "demo", "--data", "demo", "--tokens", "7", "--images", "20"]
    assert agreement.main([*command, "--batch", "8", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert record["describe"]["sha256"][:12] in printed
    for figures in record["agreement"]:
        assert figures["tokens"] == 24 * 49  # whole batches
        assert figures["share"] == figures["equal"] / figures["tokens"]
        assert f"{figures['precision']}: {100 * figures['share']:.2f} %" in printed
    assert agreement.main([*command[:-1], "0"]) == 2
    assert "--images must be at least 1, got 0" in capsys.readouterr().err
    assert agreement.main(["--tokenizer", "nowhere", "--data", "demo"]) == 2
    assert "no tokenizer at nowhere" in capsys.readouterr().err
