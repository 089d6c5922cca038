"""The published network: golden logits, sizes, and what ``encode`` and ``decode`` promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastbeit.tokenizer import DvaeConfig, Tokenizer
from fastbeit.tokenizer import tokenizer as tokenizer_module
from fastbeit.tokenizer.dvae import Decoder, Encoder, initialise

GOLDEN = Path(__file__).parents[1] / "golden" / "dvae_encoder.safetensors"
GOLDEN_CONFIG = DvaeConfig(codes=160, widths=(16, 32, 64, 128))


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def golden_tokenizer(golden) -> Tokenizer:
    encoder = Encoder(GOLDEN_CONFIG)
    encoder.load_state_dict(
        {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    )
    return Tokenizer(encoder)


def small_tokenizer(seed: int = 0, likelihood: str = "logit-laplace", **changes) -> Tokenizer:
    config = DvaeConfig(
        **{"codes": 48, "widths": (8, 16, 24), "code_width": 12, "likelihood": likelihood} | changes
    )
    encoder, decoder = Encoder(config), Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    for network in (encoder, decoder):
        initialise(network, generator)
    return Tokenizer(encoder, decoder)


def test_logits_and_tokens_equal_the_official_code(golden, golden_tokenizer):
    mapped = golden["input.images01"] * golden_tokenizer.pixel_scale + golden_tokenizer.pixel_offset
    torch.testing.assert_close(mapped, golden["input.mapped"], rtol=0, atol=1e-6)
    logits = golden_tokenizer.logits(mapped)
    error = (logits - golden["output.logits"]).abs().max()
    assert error <= 1e-4
    top2 = golden["output.logits"].topk(2, dim=1).values
    clear = (top2[:, 0] - top2[:, 1]).flatten(1) > 1e-4
    tokens = golden_tokenizer.encode(mapped)
    assert clear.float().mean() > 0.99
    assert torch.equal(tokens[clear], golden["output.tokens"].flatten(1)[clear])


def test_published_sizes():
    with torch.device("meta"):
        encoder, decoder = Encoder(DvaeConfig()), Decoder(DvaeConfig())
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert len(encoder.state_dict()) == 74
    assert encoder.config.stride == 8
    # Counted by hand from the published widths: input, per block 1x1, 3x3, 3x3, 3x3 and 1x1 skip.
    expected, inputs = 8192 * 128 + 128, 128
    for width in (2048, 1024, 512, 256):
        for _ in range(2):
            hidden = width // 4
            expected += inputs * hidden + 2 * 9 * hidden**2 + 9 * hidden * width
            expected += 3 * hidden + width
            expected += (inputs * width + width) if inputs != width else 0
            inputs = width
    expected += 256 * 6 + 6
    assert sum(p.numel() for p in decoder.parameters()) == expected
    shapes = {k: tuple(v.shape) for k, v in encoder.state_dict().items()}
    assert shapes["blocks.input.w"] == (256, 3, 7, 7)
    assert shapes["blocks.group_2.block_1.id_path.w"] == (512, 256, 1, 1)
    assert shapes["blocks.group_4.block_2.res_path.conv_4.w"] == (2048, 512, 1, 1)
    assert shapes["blocks.output.conv.w"] == (8192, 2048, 1, 1)


def test_the_head_runs_only_at_the_positions_asked_for(golden, golden_tokenizer, monkeypatch):
    images = torch.rand(3, 3, 48, 32, generator=torch.Generator().manual_seed(1))
    everything = golden_tokenizer.encode(images)
    assert everything.shape == (3, 24) and everything.dtype == torch.int64
    logits = golden_tokenizer.logits(images)
    assert torch.equal(everything, logits.argmax(1).flatten(1))
    assert len(everything.unique()) > 5  # not one code everywhere
    positions = torch.tensor([[0, 5, 23, -1], [7, 8, 9, 10], [-1, -1, -1, -1]], dtype=torch.int32)
    rows = []
    real = tokenizer_module.linear_argmax

    def counting(x, *arguments, **named):
        rows.append(len(x))
        return real(x, *arguments, **named)

    monkeypatch.setattr(tokenizer_module, "linear_argmax", counting)
    some = golden_tokenizer.encode(images, positions)
    assert rows == [12]
    assert some.dtype == torch.int64
    expected = torch.full((3, 4), -1)
    for image in range(3):
        for slot in range(4):
            if positions[image, slot] >= 0:
                expected[image, slot] = everything[image, positions[image, slot]]
    assert torch.equal(some, expected)


def test_tokens_do_not_depend_on_memory_layout_or_batch():
    tokenizer = small_tokenizer()
    images = torch.rand(4, 3, 24, 20, generator=torch.Generator().manual_seed(2))
    together = tokenizer.encode(images)
    assert torch.equal(tokenizer.encode(images.to(memory_format=torch.channels_last)), together)
    assert torch.equal(torch.cat([tokenizer.encode(one[None]) for one in images]), together)


def test_weights_are_cast_once_and_tokens_survive_bfloat16(golden, golden_tokenizer):
    encoder = Encoder(GOLDEN_CONFIG)
    encoder.load_state_dict(golden_tokenizer.encoder.state_dict())
    half = Tokenizer(encoder).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.encoder.head.w.is_contiguous(memory_format=torch.channels_last)
    exact = golden["output.logits"]
    gap = exact.topk(2, dim=1).values
    error = (half.logits(golden["input.mapped"]).float() - exact).abs().max()
    clear = (gap[:, 0] - gap[:, 1]).flatten(1) > 2 * error
    tokens = half.encode(golden["input.mapped"])
    assert clear.any()
    assert torch.equal(tokens[clear], golden["output.tokens"].flatten(1)[clear])


def test_it_stays_frozen_and_in_eval_mode():
    tokenizer = small_tokenizer()
    torch.nn.ModuleList([tokenizer]).train()
    assert not any(module.training for module in tokenizer.modules())
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert not tokenizer.encode(torch.rand(1, 3, 8, 8)).requires_grad


@pytest.mark.parametrize("likelihood", ["logit-laplace", "mse"])
def test_decoder_equals_the_formula_written_out(likelihood):
    tokenizer = small_tokenizer(3, likelihood)
    weights = tokenizer.decoder.state_dict()
    codes = torch.randint(0, 48, (2, 3, 4), generator=torch.Generator().manual_seed(4))

    def conv(x, name):
        w = weights[f"{name}.w"]
        return F.conv2d(x, w, weights[f"{name}.b"], padding=w.shape[-1] // 2)

    x = conv(F.one_hot(codes, 48).permute(0, 3, 1, 2).float(), "blocks.input")
    for group in (1, 2, 3):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            assert [weights[f"{name}.res_path.conv_{i}.w"].shape[-1] for i in (1, 2, 3, 4)] == [
                1, 3, 3, 3,
            ]  # fmt: skip
            branch = x
            for i in (1, 2, 3, 4):
                branch = conv(branch.relu(), f"{name}.res_path.conv_{i}")
            skip = conv(x, f"{name}.id_path") if f"{name}.id_path.w" in weights else x
            x = skip + branch / 36  # (3 groups x 2 blocks) squared
        if group < 3:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = conv(x.relu(), "blocks.output.conv")[:, :3]
    pixels = x.sigmoid() if likelihood == "logit-laplace" else x
    expected = ((pixels - 0.1) / 0.8).clamp(0, 1)
    drawn = tokenizer.decode(codes)
    assert drawn.shape == (2, 3, 12, 16) and drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-6)
    relaxed = tokenizer.decoder(F.one_hot(codes, 48).permute(0, 3, 1, 2).float())
    torch.testing.assert_close(tokenizer.decoder.pixels(relaxed), drawn, rtol=0, atol=2e-6)


def test_describe_is_plain_and_complete():
    about = small_tokenizer().describe()
    assert (about["codes"], about["stride_px"], about["has_decoder"]) == (48, 4, True)
    assert about["parameters"] > about["encoder_parameters"] > 0
    assert DvaeConfig.from_dict(about["config"]) == small_tokenizer().config


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 1, 8, 8), r"\[B, 3, H, W\].*\(2, 1, 8, 8\)"),
        (torch.rand(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.rand(1, 3, 8, 10), "multiples of 4 pixels.*8 x 10"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        small_tokenizer().encode(images)


def test_bad_positions_and_tokens_are_refused():
    tokenizer = small_tokenizer()
    with pytest.raises(ValueError, match=r"B = 2, got \(3, 1\)"):
        tokenizer.encode(torch.rand(2, 3, 8, 8), torch.zeros(3, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"in \[0, 48\), got 0 to 48"):
        tokenizer.decode(torch.tensor([[[0, 48]]]))
    with pytest.raises(ValueError, match="got -1"):
        tokenizer.decode(torch.tensor([[[0, -1]]]))
    with pytest.raises(ValueError, match="integers"):
        tokenizer.decode(torch.rand(1, 2, 2))
    with pytest.raises(ValueError, match="holds no decoder"):
        Tokenizer(tokenizer.encoder).decode(torch.zeros(1, 2, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": ()}, "widths"),
        ({"widths": (8, 6)}, "multiples of 4"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"codes": 1}, "codes must be at least 2"),
        ({"likelihood": "l1"}, "likelihood"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DvaeConfig(**change)
