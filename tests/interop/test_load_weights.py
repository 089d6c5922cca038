"""What fits is loaded and listed; what doesn't is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastbeit.interop import WeightsError, load_weights, save_weights
from fastbeit.model import BeitClassifier, BeitConfig, BeitForMim
from fastbeit.model.resize import resize_pos_embed, resize_relative_table

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLES = tuple(f"blocks.{i}.attn.relative_position_bias_table" for i in range(2))


def refused(model, path, match, **arguments) -> None:
    """The file is refused with this message, and no parameter has moved."""
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(WeightsError, match=match):
        load_weights(model, path, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("layout", ["official", "hf"])
@pytest.mark.parametrize("position", ["relative", "relative_per_block", "absolute", "none"])
def test_round_trip_is_exact_and_complete(tmp_path, make_mim, layout, position) -> None:
    model = make_mim(position=position)
    path = save_weights(model, tmp_path / "w.safetensors", layout).path
    other = BeitForMim(model.config, seed=8)
    report = load_weights(other, path, layout)
    assert report.missing == report.resized == report.copied == ()
    assert all(name.endswith("relative_position_index") for name in report.unused)
    assert set(report.used) | set(report.unused) == set(load_file(path))
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_official_export_has_the_official_names_shapes_and_index(tmp_path) -> None:
    """Against the names of a checkpoint that the official code wrote."""
    golden = load_file(GOLDEN / "pretrain_beit_plus.safetensors")
    official = {
        k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")
    }
    model = BeitForMim(BeitConfig(width=64, depth=2, heads=2, vocab_size=192))
    save_file(official, tmp_path / "theirs.safetensors")
    report = load_weights(model, tmp_path / "theirs.safetensors")
    assert report.unused == ("rel_pos_bias.relative_position_index",)
    ours = load_file(save_weights(model, tmp_path / "ours.safetensors").path)
    assert ours.keys() == official.keys()
    assert all(torch.equal(ours[name], official[name]) for name in official)


def test_mim_checkpoint_into_classifier(tmp_path, make_mim, make_classifier) -> None:
    mim, classifier = make_mim(), make_classifier()
    head = classifier.head.weight.clone()
    path = save_weights(mim, tmp_path / "mim.safetensors").path
    report = load_weights(classifier, path)
    assert set(report.missing) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert set(report.unused) == {
        "lm_head.weight", "lm_head.bias", "norm.weight", "norm.bias", "mask_token",
        "rel_pos_bias.relative_position_index",
    }  # fmt: skip
    assert report.copied == BLOCK_TABLES
    assert SHARED in report.used
    table = dict(mim.named_parameters())[SHARED]
    for name in BLOCK_TABLES:
        parameter = classifier.get_parameter(name)
        assert torch.equal(parameter, table)
    first, second = (classifier.get_parameter(name) for name in BLOCK_TABLES)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(classifier.head.weight, head)
    assert "copied: 2" in str(report)


def test_equal_block_tables_become_the_shared_one_again(tmp_path, make_mim) -> None:
    model = make_mim()
    path = save_weights(model, tmp_path / "timm.safetensors", "timm").path
    other = BeitForMim(model.config, seed=8)
    report = load_weights(other, path)
    assert report.copied == (SHARED,)
    assert set(BLOCK_TABLES) <= set(report.used)
    assert torch.equal(other.get_parameter(SHARED), model.get_parameter(SHARED))
    state = load_file(path)
    state[BLOCK_TABLES[1]] += 1
    save_file(state, path)
    refused(other, path, "has no place: the model has no such table")


def test_packed_bias_in_a_file_is_split_and_its_key_third_left_out(tmp_path, make_mim) -> None:
    model = make_mim()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["blocks.0.attn.qkv.bias"].unflatten(0, (3, -1))[1] = 7.0
    save_file(state, tmp_path / "packed.safetensors")
    other = BeitForMim(model.config, seed=8)
    load_weights(other, tmp_path / "packed.safetensors")
    assert torch.equal(other.blocks[0].attn.qkv.bias, model.blocks[0].attn.qkv.bias)


def test_positions_are_resized_to_the_models_grid(tmp_path, make_mim) -> None:
    for position, name, resize in (
        ("relative", SHARED, resize_relative_table),
        ("absolute", "pos_embed", resize_pos_embed),
    ):
        small = make_mim(position=position)
        path = save_weights(small, tmp_path / f"{position}.safetensors").path
        large = make_mim(position=position, image_size=(48, 64))
        report = load_weights(large, path)
        assert report.resized == (name,)
        expected = resize(small.get_parameter(name), (4, 4), (6, 8))
        assert torch.allclose(large.get_parameter(name), expected, atol=1e-6)


def test_a_grid_that_is_no_square_must_be_said(tmp_path, make_mim) -> None:
    path = save_weights(make_mim(image_size=(32, 64)), tmp_path / "wide.safetensors").path
    square = make_mim()
    refused(square, path, "say of which with grid")
    refused(square, path, "a relative table of a 5x8 grid", grid=(5, 8))
    assert load_weights(square, path, grid=(4, 8)).resized == (SHARED,)
    # Turned by a quarter, the table has as many rows: only the grid tells.
    turned = make_mim(image_size=(64, 32))
    assert load_weights(turned, path, grid=(4, 8)).resized == (SHARED,)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"width": 64}, r"proj\.bias is \[32\], the model's .* is \[64\]\n(.|\n)*and 25 more"),
        ({"heads": 4}, r"bias_table is \[52, 2\], the model's .* is \[52, 4\]"),
        ({"depth": 1}, "it has 2 blocks, the model 1"),
        ({"depth": 3}, r"blocks\.2\.norm1\.weight is missing"),
        ({"layer_scale": None}, r"gamma_1 has no place: the model has no LayerScale"),
        ({"position": "absolute"}, r"pos_embed is missing"),
        ({"position": "none"}, "has no place: the model has no such table"),
        ({"patch_size": 16}, r"patch_embed\.proj\.weight is \[32, 3, 8, 8\]"),
        ({"vocab_size": 21}, r"lm_head\.weight is \[20, 32\], .* is \[21, 32\]"),
    ],
)
def test_another_architecture_is_refused_whole(tmp_path, make_mim, changes, match) -> None:
    path = save_weights(make_mim(), tmp_path / "w.safetensors").path
    refused(make_mim(**changes), path, match)


def test_half_a_head_is_refused(tmp_path, make_mim, make_classifier) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(make_mim(), path, omit=["lm_head.bias"])
    refused(make_mim(), path, r"lm_head\.bias is missing")
    save_weights(make_classifier(), path, omit=["fc_norm.weight", "fc_norm.bias"])
    refused(make_classifier(), path, r"fc_norm\.weight is missing")
    save_weights(make_mim(), path, omit=["blocks.1.mlp.fc2.weight"])
    refused(make_mim(), path, r"blocks\.1\.mlp\.fc2\.weight is missing")


def test_what_is_excused_keeps_its_value(tmp_path, make_classifier, make_mim) -> None:
    path = save_weights(make_classifier(num_classes=7), tmp_path / "w.safetensors").path
    model = make_classifier()
    refused(model, path, r"head\.weight is \[7, 32\]")
    head = model.head.weight.clone()
    report = load_weights(model, path, allow_missing=["head"])
    assert set(report.missing) == {"head.weight", "head.bias"}
    assert torch.equal(model.head.weight, head)
    mim = make_mim(position="relative_per_block")
    refused(mim, path, r"norm\.weight is missing")
    report = load_weights(mim, path, allow_missing=["norm."])
    assert {"norm.weight", "norm.bias", "mask_token"} <= set(report.missing)


def test_formats_are_told_apart_and_foreign_files_refused(tmp_path, make_mim) -> None:
    model = make_mim()
    hf = save_weights(model, tmp_path / "hf", "hf").path
    assert load_weights(model, hf).layout == "hf"
    refused(model, hf, "has hf names, but format='timm'", format="timm")
    with pytest.raises(ValueError, match="format must be auto or one of official, timm, hf"):
        load_weights(model, hf, format="keras")
    with pytest.raises(ValueError, match="format must be one of official, timm, hf"):
        save_weights(model, hf, format="auto")
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    refused(model, tmp_path / "resnet.safetensors", r"is not a BEiT checkpoint: .*conv1\.weight")
    state = load_file(hf)
    del state["beit.encoder.layer.0.attention.attention.key.weight"]
    save_file(state, tmp_path / "nokey.safetensors")
    refused(model, tmp_path / "nokey.safetensors", "layer 0 has no weight for key")
    state = load_file(hf)
    state["beit.layernorm.weight"] = state["layernorm.weight"].clone()
    save_file(state, tmp_path / "twonorms.safetensors")
    refused(model, tmp_path / "twonorms.safetensors", "two last norms")
    path = tmp_path / "integers.safetensors"
    save_weights(model, path)
    state = load_file(path)
    state["cls_token"] = state["cls_token"].to(torch.int32)
    save_file(state, path)
    refused(model, path, "cls_token is torch.int32, not floating point")


def test_half_precision_files_load_into_fp32(tmp_path, make_mim) -> None:
    model = make_mim()
    path = save_weights(make_mim().bfloat16(), tmp_path / "half.safetensors").path
    load_weights(model, path)
    assert model.cls_token.dtype == torch.float32
    assert torch.equal(model.cls_token, make_mim().cls_token.bfloat16().float())


def test_hf_export_of_relative_positions_on_a_wide_grid_is_refused(tmp_path, make_mim) -> None:
    with pytest.raises(ValueError, match="height and width exchanged"):
        save_weights(make_mim(image_size=(32, 64)), tmp_path / "hf", "hf")
    save_weights(make_mim(image_size=(32, 64), position="absolute"), tmp_path / "hf", "hf")


def test_classifier_of_one_shared_table_round_trips(tmp_path, make_classifier, images) -> None:
    model = make_classifier(position="relative")
    path = save_weights(model, tmp_path / "w.safetensors").path
    other = BeitClassifier(model.config, seed=2)
    load_weights(other, path)
    with torch.no_grad():
        assert torch.equal(model(images), other(images))
