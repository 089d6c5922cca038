"""``fastbeit_kernels.timm``: the untouched model's outputs and gradients, and a way back."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from adapted import applied, check_agreement, images, randomise, results, same_bits
from peer_models import peer

SIZES = {
    "img_size": (16, 24),  # a window that isn't square
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}
# Model, and what makes it another case than those above it.
CASES = {
    "beit, shared table": ("beit.Beit", {"use_shared_rel_pos_bias": True, "init_values": 0.1}),
    "beit, table per block": (
        "beit.Beit",
        {
            "use_rel_pos_bias": True,
            "use_abs_pos_emb": False,
            "init_values": 0.1,
            "drop_path_rate": 0.5,
        },
    ),
    "beit, both tables": ("beit.Beit", {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": True}),
    "vit": ("vision_transformer.VisionTransformer", {"drop_path_rate": 0.4, "proj_drop_rate": 0.2}),
    "vit, registers": (
        "vision_transformer.VisionTransformer",
        {"reg_tokens": 2, "init_values": 0.1, "class_token": False, "global_pool": "avg"},
    ),
    "vit, query and key norms": ("vision_transformer.VisionTransformer", {"qk_norm": True}),
    "eva02": (
        "eva.Eva",
        {
            "use_rot_pos_emb": True,
            "ref_feat_shape": (2, 3),
            "swiglu_mlp": True,
            "scale_mlp": True,
            "qkv_fused": False,
            "init_values": 0.1,
        },
    ),
    "eva, norms, half rotations": (
        "eva.Eva",
        {
            "qk_norm": True,
            "use_rot_pos_emb": True,
            "rope_rotate_half": True,
            "scale_attn_inner": True,
            "drop_path_rate": 0.4,
        },
    ),
    "eva, grouped queries": (
        "eva.Eva",
        {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "use_rot_pos_emb": True},
    ),
}


@pytest.fixture(scope="module")
def adapter():
    peer("timm")
    import fastbeit_kernels.timm

    return fastbeit_kernels.timm


@pytest.fixture(scope="module")
def make(adapter):
    def build(case: str = "beit, table per block", **changes):
        place, arguments = CASES[case]
        module, _, name = place.partition(".")
        kind = getattr(getattr(peer("timm").models, module), name)
        torch.manual_seed(0)
        return randomise(kind(**{**SIZES, **arguments, **changes}))

    return build


def forward(model, pixels):
    return model(pixels)


@pytest.fixture
def pixels():
    return images(*SIZES["img_size"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_reference_agrees_with_the_untouched_model(adapter, make, pixels, case, training) -> None:
    model = make(case).train(training)
    check_agreement(model, applied(adapter.apply, model), pixels, forward)


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_untouched_model(adapter, make, pixels, case) -> None:
    depth = 2 if case == "beit, both tables" else 1  # the shared table is read twice
    model = make(case, depth=depth).train()
    check_agreement(model, applied(adapter.apply, model, "triton"), pixels[:2], forward)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("how", ["bfloat16 model", "autocast"])
def test_half_precision_agrees(adapter, make, pixels, impl, how) -> None:
    model = make(depth=1).train()
    autocast = how == "autocast"
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fast = applied(adapter.apply, model, impl)
        check_agreement(model, fast, pixels[:2], forward, working=torch.bfloat16)


def test_every_part_goes_to_its_operation(adapter, make, pixels, monkeypatch) -> None:
    from fastbeit_kernels._attention import ops as attention
    from fastbeit_kernels._layer_norm import ops as layer_norm
    from fastbeit_kernels._rel_pos_bias import ops as rel_pos_bias

    calls = []

    def watch(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or real(*args))

    watch(attention, "attention_packed")
    watch(rel_pos_bias, "expand_rel_pos_bias")
    watch(layer_norm, "scale_residual_layer_norm")
    watch(layer_norm, "scale_residual")
    applied(adapter.apply, make(), "triton")(pixels)
    block = [
        "scale_residual_layer_norm",  # norm1
        "expand_rel_pos_bias",
        "attention_packed",
        "scale_residual_layer_norm",  # and norm2
        "scale_residual",
    ]
    assert calls == [*block, *block, "scale_residual_layer_norm"]  # and the head's norm


@pytest.mark.parametrize("case", CASES)
def test_restore_is_exact(adapter, make, pixels, case) -> None:
    model = make(case).train()
    before = results(model, pixels, forward)
    classes = [type(module) for module in model.modules()]
    attributes = [list(vars(module)) for module in model.modules()]
    keys = list(model.state_dict())
    report = adapter.apply(model, impl="reference")
    assert list(model.state_dict()) == keys
    assert set(adapter.restore(model)) == set(report.replaced)
    assert [type(module) for module in model.modules()] == classes
    assert [list(vars(module)) for module in model.modules()] == attributes
    assert same_bits(results(model, pixels, forward), before)
    assert adapter.restore(model) == ()


def test_state_dicts_pass_both_ways(adapter, make, pixels) -> None:
    model, other = make().eval(), make(num_classes=5)
    randomise(other, seed=8)
    fast = applied(adapter.apply, other).eval()
    fast.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(pixels), model(pixels))
    randomise(fast, seed=6)
    model.load_state_dict(fast.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(pixels), model(pixels))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_kernels_and_are_their_own(adapter, make, pixels, how) -> None:
    fast = applied(adapter.apply, make().train())
    twin = how(fast)
    expected = results(fast, pixels, forward)
    assert same_bits(results(twin, pixels, forward), expected)
    assert adapter.restore(twin)
    with pytest.raises(ValueError, match=r"has the kernels already; call restore\(model\) first"):
        adapter.apply(fast)
    assert same_bits(results(fast, pixels, forward), expected)


def test_only_the_given_model_changes(adapter, make) -> None:
    other = make()
    kinds = {type(module): type(module).forward for module in other.modules()}
    applied(adapter.apply, make())
    assert {type(module): type(module).forward for module in other.modules()} == kinds


@pytest.mark.parametrize("case", ["beit, table per block", "vit"])
def test_an_applied_block_compiles(adapter, make, case) -> None:
    block = applied(adapter.apply, make(case).train(), "triton").blocks[1]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    found = []
    for run in (block, compiled):
        torch.manual_seed(4)
        y = run(x)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_checkpointing_gives_the_same_gradients(adapter, make, pixels) -> None:
    pixels = pixels[:2]
    fast = applied(adapter.apply, make(depth=1).train(), "triton")
    expected = results(fast, pixels, forward)
    fast.set_grad_checkpointing()
    assert same_bits(results(fast, pixels, forward), expected)


def test_intermediate_features_and_other_sizes(adapter, make) -> None:
    model = make().eval()
    fast = applied(adapter.apply, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's resizing of the table
        for each in (model, fast):
            each.set_input_size((32, 16))
    with torch.no_grad():
        ours, expected = (
            each.forward_intermediates(images(32, 16), norm=True) for each in (fast, model)
        )
    torch.testing.assert_close(ours, expected)


def test_masks_and_gate(adapter) -> None:
    kind = peer("timm").layers.Attention
    attention = randomise(kind(32, 2, gated=True, scale_norm=True, norm_layer=torch.nn.LayerNorm))
    fast = applied(adapter.apply, attention, "triton")
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    look = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(3)) < 0.7
    look[:, :, range(7), range(7)] = True
    torch.testing.assert_close(fast(x, look), attention(x, look))
    torch.testing.assert_close(fast(x, is_causal=True), attention(x, is_causal=True))
    gradients = []
    for each in (fast, attention):
        bias = torch.linspace(-1, 1, 49).view(7, 7).requires_grad_()
        gradients += torch.autograd.grad(each(x, bias).square().sum(), bias)
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="is_causal and attn_mask"):
        fast(x, look, is_causal=True)
