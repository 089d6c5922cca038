"""What ``fastbeit_kernels.timm`` leaves to timm: named, warned of, and still right."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adapted import applied, check_agreement, images, randomise
from peer_models import peer
from torch import nn

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def adapter():
    peer("timm")
    import fastbeit_kernels.timm

    return fastbeit_kernels.timm


@pytest.fixture(scope="module")
def make(adapter):
    def build(**arguments):
        kind = peer("timm").models.vision_transformer.VisionTransformer
        return randomise(kind(**SIZES, num_classes=5, **arguments)).train()

    return build


def apply_and_compare(adapter, model):
    """The report; outputs and gradients of what the kernels and timm now share are compared."""
    fast = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="left to timm's own code") as caught:
        report = adapter.apply(fast, impl="reference")
    assert len(caught) == 1
    for name, reason in report.skipped.items():
        assert (name or "the model itself") in str(caught[0].message)
        assert reason in str(caught[0].message)
    assert set(report.replaced).isdisjoint(report.skipped)
    check_agreement(model, fast, images(16, 16), lambda model, pixels: model(pixels))
    return report


def test_attention_dropout(adapter, make) -> None:
    # In training its draws come from timm's own code, so outputs are equal then too.
    report = apply_and_compare(adapter, make(attn_drop_rate=0.3, drop_path_rate=0.0))
    assert report.skipped == {
        "blocks.0.attn": "attention dropout of 0.3, which the kernels don't have"
    }
    assert "blocks.0" in report.replaced


def test_a_shared_bias_keeps_its_dtype_for_attention_that_stays(adapter) -> None:
    kind = peer("timm").models.beit.Beit
    model = randomise(
        kind(**SIZES, num_classes=5, use_shared_rel_pos_bias=True, attn_drop_rate=0.3)
    ).bfloat16()
    with pytest.warns(UserWarning, match="attention dropout"):
        assert "rel_pos_bias" in adapter.apply(model).replaced
    assert model.rel_pos_bias().dtype == torch.bfloat16
    model(images(16, 16).bfloat16()).sum().backward()
    assert model.rel_pos_bias.relative_position_bias_table.grad.abs().sum() > 0


def test_a_wide_scale_widens_the_stream_as_it_does_in_timm(adapter, make) -> None:
    blocks = make(init_values=0.1).blocks
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = blocks(x)
        ours = applied(adapter.apply, blocks)(x)
    assert ours.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=2**-6, atol=2**-6)


def test_another_norm(adapter, make) -> None:
    report = apply_and_compare(adapter, make(norm_layer=peer("timm").layers.RmsNorm))
    assert set(report.skipped) == {
        "blocks.0",
        "blocks.0.norm1",
        "blocks.0.norm2",
        "norm",
    }
    assert report.skipped["blocks.0"] == "its norm is RmsNorm, not LayerNorm"
    assert set(report.replaced) == {"blocks.0.attn"}


@pytest.mark.parametrize("name", ["ResPostBlock", "ParallelScalingBlock"])
def test_another_block(adapter, make, name) -> None:
    block = getattr(peer("timm").models.vision_transformer, name)
    report = apply_and_compare(adapter, make(block_fn=block))
    assert list(report.skipped) == ["blocks.0"]
    assert name in report.skipped["blocks.0"]


@pytest.mark.parametrize("where", ["attn_layer", "global_pool"])
def test_another_attention(adapter, make, where) -> None:
    report = apply_and_compare(adapter, make(**{where: {"attn_layer": "diff"}.get(where, "map")}))
    name, kind = {
        "attn_layer": ("blocks.0.attn", "DiffAttention"),
        "global_pool": ("attn_pool", "AttentionPoolLatent"),
    }[where]
    assert kind in report.skipped[name]
    assert "blocks.0" in report.replaced


def test_a_subclass_and_a_norm_without_weight(adapter, make) -> None:
    class Mine(peer("timm").layers.Attention):
        def forward(self, x, **arguments):
            return 2 * super().forward(x, **arguments)

    model = make(attn_layer=Mine)
    model.norm = peer("timm").layers.LayerNorm(32, affine=False)
    report = apply_and_compare(adapter, model)
    assert report.skipped == {
        "blocks.0.attn": "Mine changes Attention in ways not known here",
        "norm": "its LayerNorm has no weight",
    }


def test_hooks_and_replaced_forwards_go_on_running(adapter, make) -> None:
    model, seen = make(), []
    model.blocks[0].norm2.register_forward_hook(lambda *args: seen.append(args[0]))
    forward = model.norm.forward
    model.norm.forward = lambda x: 2 * forward(x)
    fast = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="left to timm"):
        report = adapter.apply(fast, impl="reference")
    assert report.skipped == {
        "blocks.0": "its LayerNorm has hooks, which would not run",
        "norm": "the forward of its LayerNorm was replaced",
    }
    fast(images(16, 16))
    assert seen == [fast.blocks[0].norm2]


def test_a_late_hook_is_refused_and_outer_hooks_run(adapter, make) -> None:
    fast = applied(adapter.apply, make())
    seen = []
    for module in (fast.blocks[0], fast.blocks[0].attn, fast.blocks[0].norm1):
        module.register_forward_hook(lambda module, *_: seen.append(module))
    fast(images(16, 16))
    assert seen == [fast.blocks[0].norm1, fast.blocks[0].attn, fast.blocks[0]]
    late = fast.blocks[0].norm2.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="norm2 of a FastBlock got a hook after apply"):
        fast(images(16, 16))
    late.remove()
    fast(images(16, 16))


def test_late_dropout_is_refused(adapter, make) -> None:
    fast = applied(adapter.apply, make())
    fast.blocks[0].attn.attn_drop.p = 0.1
    fast.eval()(images(16, 16))
    with pytest.raises(RuntimeError, match="attn_drop was set after apply"):
        fast.train()(images(16, 16))


def test_another_relative_index_is_left_to_timm(adapter) -> None:
    model = randomise(
        peer("timm").models.beit.Beit(**SIZES, num_classes=5, use_rel_pos_bias=True)
    ).train()
    with torch.no_grad():
        model.blocks[0].attn.relative_position_index[1, 2] = 0
    report = apply_and_compare(adapter, model)
    assert report.skipped == {
        "blocks.0.attn": "its relative_position_index is not that of its window"
    }


def test_wide_heads_fit_the_reference_only(adapter) -> None:
    attention = peer("timm").layers.Attention(130, 1)
    with pytest.raises(ValueError, match=r"130 wide, and the kernels take up to 128"):
        adapter.apply(copy.deepcopy(attention), impl="triton")
    assert adapter.apply(attention, impl="auto").replaced == {"": "attention_packed, attention"}


def test_refusals_change_nothing(adapter, make) -> None:
    model = make()
    for other, arguments, message in (
        (nn.Sequential(nn.Conv2d(3, 8, 3)), {}, "found nothing of timm in Sequential"),
        (model, {"impl": "fast"}, "impl must be one of auto, triton, reference"),
    ):
        classes = [type(module) for module in other.modules()]
        with pytest.raises(ValueError, match=message):
            adapter.apply(other, **arguments)
        assert [type(module) for module in other.modules()] == classes
    adapter.apply(model.blocks)
    with pytest.raises(ValueError, match=r"blocks has the kernels|blocks\.0 has the kernels"):
        adapter.apply(model)
    assert type(model.norm) is peer("timm").layers.LayerNorm


def test_restore_refuses_what_something_else_took_over(adapter, make) -> None:
    fast = applied(adapter.apply, make())
    block = fast.blocks[0]
    block.__class__ = type("FSDPFastBlock", (type(block),), {})
    with pytest.raises(ValueError, match=r"blocks\.0 is a FSDPFastBlock"):
        adapter.restore(fast)
    assert isinstance(fast.blocks[0].attn, adapter.FastAttention)  # nothing was half undone


def test_without_timm_the_adapter_says_so(run_python) -> None:
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "try:\n    import fastbeit_kernels.timm\n"
        "except ImportError as error:\n    print(error)\n"
    )
    said = run_python("-c", code).stdout
    assert "fastbeit_kernels.timm adapts timm, which can't be imported" in said
    assert "pip install timm" in said


def test_nothing_to_leave_is_nothing_to_warn_of(adapter, make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = adapter.apply(make(init_values=0.1, drop_path_rate=0.2))
    assert report.skipped == {}
    assert set(report.replaced) == {"blocks.0", "norm"} | {
        f"blocks.0.{part}" for part in ("norm1", "norm2", "attn")
    }
