"""``python -m fastbeit.interop``: converts, lists the names, proves the copy."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastbeit.interop import load_weights, save_weights
from fastbeit.interop.__main__ import main
from fastbeit.interop.configs import build_model_for
from fastbeit.model import BeitClassifier, BeitForMim


def test_chain_of_layouts_ends_where_it_began(tmp_path, make_mim, capsys) -> None:
    model = make_mim()
    start = save_weights(model, tmp_path / "start.pth").path
    # A pickle says no architecture: 32 features would make one head of 64, the table says two.
    assert main([str(start), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert main([str(tmp_path / "hf"), str(tmp_path / "end.safetensors"), "--to", "official"]) == 0
    printed = capsys.readouterr().out
    assert "missing: 0" in printed
    assert "masked logits [2, 8, 20] read back: relative difference 0.0e+00" in printed
    back = BeitForMim(model.config, seed=4)
    load_weights(back, tmp_path / "end.safetensors")
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_timm_export_drops_the_head_and_invents_none_on_the_way_back(
    tmp_path, make_mim, capsys
) -> None:
    start = save_weights(make_mim(), tmp_path / "start.safetensors").path
    timm, end = tmp_path / "timm.safetensors", tmp_path / "end.safetensors"
    assert main([str(start), str(timm), "--to", "timm"]) == 0
    printed = capsys.readouterr().out
    assert "dropped: 3 (mask_token, lm_head.weight, lm_head.bias)" in printed
    assert "features [2, 17, 32] read back" in printed
    assert main([str(timm), str(end), "--to", "official"]) == 0
    assert not {"mask_token", "lm_head.weight", "lm_head.bias"} & set(load_file(end))


def test_classifier_converts_with_its_logits(tmp_path, make_classifier, capsys) -> None:
    start = save_weights(make_classifier(), tmp_path / "start.bin").path
    assert main([str(start), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert "logits [2, 10] read back: relative difference 0.0e+00" in capsys.readouterr().out
    assert isinstance(build_model_for(tmp_path / "hf"), BeitClassifier)


def test_a_copy_that_computes_something_else_is_called_out(
    tmp_path, make_mim, capsys, monkeypatch
) -> None:
    start = save_weights(make_mim(), tmp_path / "start.safetensors").path

    def damaged(model, path, layout, **arguments):
        report = save_weights(model, path, layout, **arguments)
        state = load_file(report.path)
        state["blocks.0.mlp.fc1.bias"] += 1e-3
        save_file(state, report.path)
        return report

    monkeypatch.setattr("fastbeit.interop.__main__.save_weights", damaged)
    assert main([str(start), str(tmp_path / "end.safetensors"), "--to", "official"]) == 1
    assert "computes something else" in capsys.readouterr().out


@pytest.mark.parametrize("position", ["absolute", "none"])
def test_heads_and_sizes_that_the_shapes_leave_open(tmp_path, make_mim, position) -> None:
    model = make_mim(position=position, image_size=224)
    path = save_weights(model, tmp_path / "start.pth").path
    guessed = build_model_for(path, heads=2).config
    assert (guessed.grid, guessed.heads, guessed.position) == ((28, 28), 2, position)
    assert build_model_for(path).config.heads == 1
    assert guessed.layer_scale == 0.1 and guessed.vocab_size == 20 and guessed.mlp_ratio == 4


def test_refusals_end_with_code_2(tmp_path, capsys, make_mim) -> None:
    page = tmp_path / "page.pth"
    page.write_text("<html>")
    assert main([str(page), str(tmp_path / "x.safetensors"), "--to", "hf"]) == 2
    assert "is a web page" in capsys.readouterr().err
    torch.save({"blocks.0.norm1.weight": torch.zeros(3)}, tmp_path / "part.pth")
    assert main([str(tmp_path / "part.pth"), str(tmp_path / "x.pth"), "--to", "timm"]) == 2
    assert "lacks patch_embed.proj.weight" in capsys.readouterr().err
    wide = save_weights(make_mim(image_size=(32, 64)), tmp_path / "wide.pth").path
    assert main([str(wide), str(tmp_path / "x.pth"), "--to", "official"]) == 2
    assert "not of a square grid" in capsys.readouterr().err
    assert not (tmp_path / "x.pth").exists()
