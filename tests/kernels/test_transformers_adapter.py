"""``fastbeit_kernels.transformers``: by the attention interface and layer by layer, both proved
against the untouched model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from adapted import applied, check_agreement, images, randomise, results, same_bits
from peer_models import peer
from torch import nn

SIZES = {
    "image_size": (16, 24),  # a window that isn't square: transformers swaps its sides
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
MASKED = torch.tensor([[True, False, True, False, False, False]])


def features(model, pixels):
    output = model(pixels)
    pooled = getattr(output, "pooler_output", None)
    hidden = output.last_hidden_state
    return hidden if pooled is None else hidden + pooled[:, None]


def masked_logits(model, pixels):
    return model(pixels, bool_masked_pos=MASKED.expand(len(pixels), -1)).logits


# Model, its call, and what of the configuration makes it another case.
CASES = {
    "beit": (
        "Beit",
        "Model",
        features,
        {"use_relative_position_bias": True, "drop_path_rate": 0.5, "hidden_dropout_prob": 0.2},
    ),
    "beit, masked, shared table": (
        "Beit",
        "ForMaskedImageModeling",
        masked_logits,
        {"use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 11},
    ),
    "beit, no scale": (
        "Beit",
        "Model",
        features,
        {
            "use_absolute_position_embeddings": True,
            "layer_scale_init_value": 0.0,
            "use_mean_pooling": False,
            "image_size": 16,
        },
    ),
    "data2vec": (
        "Data2VecVision",
        "Model",
        features,
        {"use_relative_position_bias": True, "drop_path_rate": 0.5, "hidden_dropout_prob": 0.2},
    ),
    "data2vec, shared table": (
        "Data2VecVision",
        "Model",
        features,
        {
            "use_shared_relative_position_bias": True,
            "use_relative_position_bias": True,
            "use_mean_pooling": False,
        },
    ),
    "vit": ("ViT", "Model", features, {"qkv_bias": False, "hidden_dropout_prob": 0.2}),
}


@pytest.fixture(scope="module")
def adapter():
    peer("transformers")
    import fastbeit_kernels.transformers

    return fastbeit_kernels.transformers


@pytest.fixture(scope="module")
def make(adapter):
    def build(case: str = "beit", attention: str | None = None, **changes):
        transformers = peer("transformers")
        kind, head, _, arguments = CASES[case]
        config = getattr(transformers, kind + "Config")(**{**SIZES, **arguments, **changes})
        model = getattr(transformers, kind + head)._from_config(
            config, attn_implementation=attention
        )
        return randomise(model)

    return build


@pytest.fixture
def pixels_of():
    return lambda model, batch=3: images(*_pair(model.config.image_size), batch=batch)


def _pair(size):
    return size if isinstance(size, (tuple, list)) else (size, size)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_applied_reference_agrees(adapter, make, pixels_of, case, training, attention) -> None:
    model = make(case, attention).train(training)
    fast = applied(adapter.apply, model)
    check_agreement(model, fast, pixels_of(model), CASES[case][2])


@pytest.mark.parametrize("case", CASES)
def test_applied_kernels_agree(adapter, make, pixels_of, case) -> None:
    model = make(case, num_hidden_layers=2 if "drop_path_rate" in CASES[case][3] else 1).train()
    fast = applied(adapter.apply, model, "triton")
    check_agreement(model, fast, pixels_of(model, 2), CASES[case][2])


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("case", [case for case in CASES if "data2vec" not in case])
def test_the_interface_agrees(adapter, make, pixels_of, case, impl) -> None:
    adapter.register("fastbeit-test", impl)
    model = make(case, num_hidden_layers=1 if impl == "triton" else 2).train()
    fast = make(case, "fastbeit-test", num_hidden_layers=model.config.num_hidden_layers).train()
    assert fast.config._attn_implementation == "fastbeit-test"
    check_agreement(model, fast, pixels_of(model, 2), CASES[case][2])
    before = results(model, pixels_of(model), CASES[case][2])
    model.set_attn_implementation("fastbeit-test")
    model.set_attn_implementation("sdpa")
    assert same_bits(results(model, pixels_of(model), CASES[case][2]), before)


def test_the_kernels_run_by_either_way(adapter, make, pixels_of, monkeypatch) -> None:
    from fastbeit_kernels._attention import ops

    calls, real = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args: calls.append(args) or real(*args))
    adapter.register("fastbeit-test", "triton")
    model = make("beit", "fastbeit-test").eval()
    model(pixels_of(model))
    assert len(calls) == 2
    assert calls[0][3].shape == (1, 2, 7, 7)  # the relative bias, without a copy for each image
    adapter.apply(model, impl="triton")
    model(pixels_of(model))
    assert len(calls) == 4


@pytest.mark.parametrize("attention", ["eager", "fastbeit-test"])
def test_padding_masks_agree_with_eager(adapter, make, pixels_of, attention) -> None:
    adapter.register("fastbeit-test", "reference")
    model = make("beit", "eager").eval()
    look = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1]])
    pixels = pixels_of(model, 2)
    with torch.no_grad():
        expected = model(pixels, attention_mask=look).last_hidden_state
        assert not torch.equal(expected, model(pixels).last_hidden_state)
        model.set_attn_implementation(attention)
        if attention == "eager":
            adapter.apply(model)
        ours = model(pixels, attention_mask=look).last_hidden_state
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("case", CASES)
def test_restore_is_exact_and_epsilon_stays(adapter, make, pixels_of, case) -> None:
    model = make(case, layer_norm_eps=1e-3).train()
    before = results(model, pixels_of(model), CASES[case][2])
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    report = adapter.apply(model, impl="reference")
    check_agreement(adapter_free(adapter, model), model, pixels_of(model), CASES[case][2])
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-3}
    assert list(model.state_dict()) == keys
    assert set(adapter.restore(model)) == set(report.replaced)
    assert [type(module) for module in model.modules()] == classes
    assert same_bits(results(model, pixels_of(model), CASES[case][2]), before)


def adapter_free(adapter, model):
    free = copy.deepcopy(model)
    adapter.restore(free)
    return free


def test_copies_pickles_and_saved_weights(adapter, make, pixels_of, tmp_path) -> None:
    fast = applied(adapter.apply, make().train())
    expected = results(fast, pixels_of(fast), features)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert same_bits(results(twin, pixels_of(fast), features), expected)
    fast.save_pretrained(tmp_path)
    back = peer("transformers").BeitModel.from_pretrained(tmp_path).train()
    check_agreement(back, fast, pixels_of(fast), features)


def test_checkpointing_and_hidden_states(adapter, make, pixels_of) -> None:
    model = make().train()
    fast = applied(adapter.apply, model)
    pixels = pixels_of(fast)
    expected = results(fast, pixels, features)
    fast.activation_checkpointing_enable()
    assert same_bits(results(fast, pixels, features), expected)
    ours, theirs = (
        each.eval()(pixels, output_hidden_states=True).hidden_states for each in (fast, model)
    )
    assert len(ours) == 3
    torch.testing.assert_close(ours, theirs)


def test_an_applied_layer_and_the_interface_compile(adapter, make) -> None:
    adapter.register("fastbeit-test", "triton")
    layer = applied(adapter.apply, make("vit").eval(), "triton").layers[0]
    interface = make("vit", "fastbeit-test").eval().layers[0]
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    for module in (layer, interface):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        (ours,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (expected,) = torch.autograd.grad(module(x).square().sum(), x)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("way", ["interface", "apply"])
def test_what_the_kernels_do_not_have_is_refused(adapter, make, pixels_of, way) -> None:
    adapter.register("fastbeit-test")
    model = make("beit", "fastbeit-test" if way == "interface" else "eager").train()
    if way == "apply":
        adapter.apply(model)
    for name in ("output_attentions", "softcap"):
        with pytest.raises(ValueError, match=f"was called with {name}, which the kernels"):
            model(pixels_of(model), **{name: True})
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"wants attention dropout of 0\.1"):
        model(pixels_of(model))
    model.eval()(pixels_of(model))


def test_the_function_refuses_other_attention(adapter) -> None:
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="causal"):
        adapter.attention_forward(nn.Identity(), q, q, q, None)
    with pytest.raises(ValueError, match="4 heads and key 2"):
        adapter.attention_forward(nn.Identity(), q, k, k, None, is_causal=False)
    with pytest.raises(ValueError, match="head_mask"):
        adapter.attention_forward(nn.Identity(), q, q, q, None, is_causal=False, head_mask=q)
    ours, weights = adapter.attention_forward(nn.Identity(), q, q, q, None, 0.3, is_causal=False)
    expected = nn.functional.scaled_dot_product_attention(q, q, q, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(ours, expected)
    assert weights is None


def test_names_of_others_are_refused(adapter) -> None:
    for name in ("sdpa", "eager"):
        with pytest.raises(ValueError, match="another attention of transformers"):
            adapter.register(name)
    with pytest.raises(ValueError, match="impl must be one of"):
        adapter.register("fastbeit-test", impl="fast")


def test_left_modules_are_named(adapter, make, pixels_of) -> None:
    model = make("data2vec", attention_probs_dropout_prob=0.1)
    model.encoder.layer[1].drop_path = nn.Dropout(0.1)
    with pytest.warns(UserWarning, match="left to transformers's own code"):
        report = adapter.apply(model)
    attention = "attention dropout of 0.1, which the kernels don't have"
    assert report.skipped == {
        "encoder.layer.0.attention.attention": attention,
        "encoder.layer.1.attention.attention": attention,
        "encoder.layer.1": "its drop_path is Dropout, which isn't known here",
    }
    with pytest.raises(ValueError, match="has the kernels already"):
        adapter.apply(model)
