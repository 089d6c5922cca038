"""timm's and transformers' own BEiT compute what ours does, on the same weights, both ways."""

from __future__ import annotations

import pytest
import torch
from peer_models import peer
from safetensors.torch import load_file, save_file

from fastbeit.interop import load_weights, save_weights
from fastbeit.model import BeitClassifier, BeitForMim

POSITION_CASES = [
    ("relative", 0.1),
    ("relative_per_block", 0.1),
    ("absolute", None),
    ("none", None),
]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def timm_beit(config, **arguments):
    timm = peer("timm")
    return timm.models.beit.Beit(
        img_size=config.image_hw,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        qkv_bias=True,
        init_values=config.layer_scale,
        use_abs_pos_emb=config.position == "absolute",
        use_rel_pos_bias=config.position in ("relative", "relative_per_block"),
        **arguments,
    ).eval()


def hf_positions(indices: torch.Tensor, patches: int) -> torch.Tensor:
    return torch.zeros(len(indices), patches, dtype=torch.bool).scatter(1, indices.long(), True)


@pytest.mark.parametrize(("position", "layer_scale"), POSITION_CASES)
def test_timm_features_of_a_mim_export(tmp_path, make_mim, images, position, layer_scale) -> None:
    model = make_mim(position=position, layer_scale=layer_scale)
    report = save_weights(model, tmp_path / "timm.safetensors", "timm")
    theirs = timm_beit(model.config, num_classes=0, global_pool="")
    theirs.load_state_dict(load_file(report.path), strict=True)  # complete: nothing left over
    assert set(report.dropped) == {"mask_token", "lm_head.weight", "lm_head.bias"}
    with torch.no_grad():
        expected = theirs.forward_features(images)
        assert relative_error(model.features(images), expected) < 1e-5

    save_file(theirs.state_dict(), tmp_path / "back.safetensors")
    back = BeitForMim(model.config, seed=3)
    came = load_weights(back, tmp_path / "back.safetensors", "timm")
    assert set(came.missing) == set(report.dropped)
    assert came.unused == ()
    with torch.no_grad():
        assert relative_error(back.features(images), expected) < 1e-5


def test_timm_logits_of_a_classifier_both_ways(tmp_path, make_classifier, images) -> None:
    model = make_classifier()
    theirs = timm_beit(model.config, num_classes=10, global_pool="avg")
    path = save_weights(model, tmp_path / "timm.safetensors", "timm").path
    theirs.load_state_dict(load_file(path), strict=True)
    with torch.no_grad():
        expected = theirs(images)
        assert relative_error(model(images), expected) < 1e-5
        theirs.head.weight.mul_(2)
        theirs.blocks[1].attn.v_bias.add_(1)
        expected = theirs(images)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    back = BeitClassifier(model.config, seed=3)
    report = load_weights(back, tmp_path / "timm.pth")
    assert report.missing == report.unused == ()
    with torch.no_grad():
        assert relative_error(back(images), expected) < 1e-5


@pytest.mark.parametrize(("position", "layer_scale"), POSITION_CASES)
def test_transformers_masked_logits_both_ways(
    tmp_path, make_mim, images, position, layer_scale
) -> None:
    transformers = peer("transformers")
    model = make_mim(position=position, layer_scale=layer_scale)
    save_weights(model, tmp_path / "ours", "hf")
    theirs, info = transformers.BeitForMaskedImageModeling.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.layer_norm_eps == 1e-6
    theirs.eval()
    masked = torch.tensor([[0, 3, 7, 15], [1, 2, 8, 9]], dtype=torch.int32)
    with torch.no_grad():
        for block in theirs.beit.layers:
            block.attention.q_proj.bias.mul_(3)  # so that the way back is a way of its own
        expected = theirs(images, bool_masked_pos=hf_positions(masked, 16)).logits
    theirs.save_pretrained(tmp_path / "theirs")
    for source in (tmp_path / "theirs", tmp_path / "pickled.bin"):
        if source.suffix:
            torch.save(theirs.state_dict(), source)  # transformers' module names, not its files'
        back = BeitForMim(model.config, seed=3)
        report = load_weights(back, source)
        assert report.layout == "hf"
        assert report.missing == report.unused == ()
        with torch.no_grad():
            ours = back(images, masked)
            rows = expected.gather(1, masked.long()[..., None].expand(-1, -1, 20))
            assert relative_error(ours, rows) < 1e-5


@pytest.mark.parametrize("position", ["relative", "relative_per_block", "absolute"])
def test_transformers_class_logits_both_ways(tmp_path, make_classifier, images, position) -> None:
    transformers = peer("transformers")
    model = make_classifier(position=position)
    save_weights(model, tmp_path / "model.safetensors", "hf")
    theirs, info = transformers.BeitForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected = theirs.eval()(images).logits
        assert relative_error(model(images), expected) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    back = BeitClassifier(model.config, seed=3)
    report = load_weights(back, tmp_path / "theirs", "hf")
    assert report.missing == report.unused == ()
    with torch.no_grad():
        assert relative_error(back(images), expected) < 1e-5


def test_transformers_bare_model_reads_a_mim_export(tmp_path, make_mim, images) -> None:
    transformers = peer("transformers")
    model = make_mim()
    save_weights(model, tmp_path, "hf")
    theirs = transformers.BeitModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad():
        # Its last norm is the head's (use_mean_pooling): compare the last block's output.
        expected = theirs(images).last_hidden_state
        assert relative_error(model.layer_features(images)[-1], expected) < 1e-5
