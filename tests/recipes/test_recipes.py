"""The recipes say what the paper and the released code say, and every one can run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastbeit.recipes import DEFAULT_RECIPE, RECIPES, list_recipes, load_recipe
from fastbeit.tokenizer.files import DEMO_PATH, read_tokenizer
from fastbeit.training import layout
from fastbeit.training.cost import count_parameters

IMAGENET_1K = 1_281_167


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_names_itself(name: str) -> None:
    config = load_recipe(name)
    config.validate(need_data=False)
    assert config.recipe == name
    assert str(config.run_dir) == f"runs/{name}"
    images = RECIPES[name].NUM_IMAGES
    assert layout.warmup_steps(config, images) <= layout.total_steps(config, images)
    micro_batch, accumulation, _ = layout.resolve_batch(config, 8)
    assert 8 * micro_batch * accumulation == config.run.global_batch


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_where_it_comes_from_and_what_to_expect(name: str) -> None:
    text = RECIPES[name].__doc__ or ""
    assert "-m fastbeit.pretrain" in text
    assert "Expected" in text
    assert name == "demo" or f"-m fastbeit.pretrain {name}" in text
    assert name == "smoke" or "arXiv" in text
    assert f"  {name} " in list_recipes()


@pytest.mark.parametrize("name", ["beit-base-in1k", "beit-base-in1k-paper"])
def test_base_in1k_has_the_papers_numbers(name: str) -> None:
    config = load_recipe(name)
    assert layout.steps_per_epoch(config, IMAGENET_1K) == 625
    assert layout.total_steps(config, IMAGENET_1K) == 500_000
    assert layout.warmup_steps(config, IMAGENET_1K) == 6_250
    optimizer, data, model, mask = config.optimizer, config.data, config.model, config.mask
    assert (optimizer.lr, optimizer.min_lr, optimizer.weight_decay) == (1.5e-3, 1e-5, 0.05)
    assert (optimizer.betas, optimizer.eps, optimizer.clip_norm) == ((0.9, 0.999), 1e-8, 3.0)
    assert config.run.global_batch == 2048
    assert (data.crop_scale, data.flip, data.jitter) == ((0.08, 1.0), 0.5, (0.4, 0.4, 0.4))
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (mask.strategy, mask.target, mask.min_block) == ("block", 75, 16)
    assert (model.image_size, model.patch_size, model.vocab_size) == (224, 16, 8192)
    assert (model.width, model.depth, model.heads, model.mlp_ratio) == (768, 12, 12, 4)
    assert (model.drop_path, config.tokenizer.tokenizer) == (0.1, "dall-e")


def test_the_two_base_recipes_differ_in_architecture_and_exact_tokens() -> None:
    plus, paper = load_recipe("beit-base-in1k"), load_recipe("beit-base-in1k-paper")
    assert (plus.model.position, plus.model.layer_scale) == ("relative", 0.1)
    assert (paper.model.position, paper.model.layer_scale) == ("absolute", None)
    assert count_parameters(plus.model).trained == 91_965_776
    assert count_parameters(paper.model).trained == 92_089_856
    assert (plus.data, plus.run, plus.optimizer, plus.mask) == (
        paper.data,
        paper.run,
        paper.optimizer,
        paper.mask,
    )
    # As the paper's numbers were made: every token by fp32.
    assert paper.tokenizer == replace(plus.tokenizer, tokenizer_precision="fp32")


def test_large_and_22k_change_what_the_released_code_changes() -> None:
    base, large, wide = map(load_recipe, ("beit-base-in1k", "beit-large-in1k", "beit-base-in22k"))
    assert (large.model.width, large.model.depth, large.model.heads) == (1024, 24, 16)
    assert (large.model.layer_scale, large.optimizer.clip_norm) == (1e-5, 1.0)
    assert (large.run, large.data, large.optimizer.lr) == (base.run, base.data, base.optimizer.lr)
    assert layout.total_steps(wide, RECIPES["beit-base-in22k"].NUM_IMAGES) == 150 * 6_932
    assert layout.warmup_steps(wide, RECIPES["beit-base-in22k"].NUM_IMAGES) == 10_000
    assert (wide.data.mean, wide.data.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert wide.model == base.model


def test_the_demo_masks_two_fifths_and_fits_its_tokenizer() -> None:
    config = load_recipe(DEFAULT_RECIPE)
    assert DEFAULT_RECIPE == "demo"
    assert config.data.data == config.tokenizer.tokenizer == "demo"
    assert round(config.mask.target / config.model.patches, 1) == 0.4
    tokenizer = read_tokenizer(DEMO_PATH)
    assert tokenizer.vocab_size == config.model.vocab_size
    assert tokenizer.channels == config.model.in_channels


def test_smoke_takes_a_few_dozen_steps_of_the_demos_data() -> None:
    smoke, demo = load_recipe("smoke"), load_recipe("demo")
    assert (smoke.data, smoke.tokenizer) == (demo.data, demo.tokenizer)
    assert 20 <= layout.total_steps(smoke, RECIPES["smoke"].NUM_IMAGES) <= 100
    assert count_parameters(smoke.model).trained < count_parameters(demo.model).trained / 5


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("beit_base_in1k", "beit-base-in1k"),
        ("beit-base-in1k-papr", "beit-base-in1k-paper"),
        ("beit-larg", "beit-large-in1k"),
        ("dmeo", "demo"),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_nearest(asked: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean {nearest}[?].*beit-base-in22k"):
        load_recipe(asked)
