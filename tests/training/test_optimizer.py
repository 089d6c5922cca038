"""Parameter groups against the official membership; the scaled, skippable AdamW step; apex."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fastbeit.model import BeitClassifier, BeitConfig, BeitForMim
from fastbeit.training.config import OptimizerConfig
from fastbeit.training.optimizer import (
    build_optimizer,
    optimizer_tensors,
    param_groups,
    scaled_step,
    set_lr,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schedules.json").read_text())
TINY = BeitConfig(image_size=32, patch_size=16, width=16, depth=2, heads=2, vocab_size=8)


def by_name(groups):
    return {
        name: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for name in group["names"]
    }


def official_names(name):
    """Files hold the packed qkv bias as two parameters."""
    if name.endswith("qkv.bias"):
        prefix = name.removesuffix("qkv.bias")
        return [prefix + "q_bias", prefix + "v_bias"]
    return [name]


def test_layer_decay_and_membership_equal_the_official_code():
    official = GOLDEN["layer_decay"]
    with torch.device("meta"):
        model = BeitClassifier(BeitConfig(position="relative_per_block", depth=official["depth"]))
    groups = param_groups(model, weight_decay=0.05, layer_decay=official["decay"])
    mine = {
        official: value
        for name, value in by_name(groups).items()
        for official in official_names(name)
    }
    assert set(mine) == {entry["name"] for entry in official["parameters"]}
    for entry in official["parameters"]:
        scale, decay = mine[entry["name"]]
        assert scale == pytest.approx(entry["lr_scale"], rel=1e-12), entry["name"]
        assert (decay > 0) == entry["decayed"], entry["name"]


def test_pretraining_groups_decay_the_table_and_mask_token_but_not_positions():
    with torch.device("meta"):
        relative = by_name(param_groups(BeitForMim(TINY), weight_decay=0.05))
        absolute = by_name(
            param_groups(
                BeitForMim(BeitConfig(position="absolute", layer_scale=None, depth=1)),
                weight_decay=0.05,
            )
        )
    for name in ("mask_token", "rel_pos_bias.relative_position_bias_table", "lm_head.weight"):
        assert relative[name] == (1.0, 0.05)
    for name in ("cls_token", "lm_head.bias", "norm.weight", "blocks.0.gamma_1"):
        assert relative[name] == (1.0, 0.0)
    assert absolute["pos_embed"] == (1.0, 0.0)


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_layer_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="layer_decay must be in"):
        param_groups(torch.nn.Linear(2, 2), weight_decay=0.1, layer_decay=decay)


def test_layer_decay_needs_blocks():
    with pytest.raises(ValueError, match="Linear has none"):
        param_groups(torch.nn.Linear(2, 2), weight_decay=0.1, layer_decay=0.5)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_scale_divides_gradients_and_skip_moves_nothing():
    ours, plain = BeitForMim(TINY, seed=0), BeitForMim(TINY, seed=0)
    optimizer = build_optimizer(ours, OptimizerConfig(lr=1e-2))
    reference = torch.optim.AdamW(
        param_groups(plain, weight_decay=0.05), lr=1e-2, fused=False, foreach=False
    )
    for step in range(3):
        gradients(ours, step)
        gradients(plain, step)
        for parameter in plain.parameters():
            parameter.grad /= 4.0
        scaled_step(optimizer, torch.tensor(4.0), torch.tensor(0.0))
        reference.step()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)

    before = {k: v.clone() for k, v in ours.state_dict().items()}
    state = {k: v.clone() for k, v in optimizer_tensors(optimizer).items()}
    for parameter in ours.parameters():
        parameter.grad.fill_(float("nan"))
    scaled_step(optimizer, torch.tensor(1.0), torch.tensor(1.0))
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())
    assert all(torch.equal(state[k], v) for k, v in optimizer_tensors(optimizer).items())


def test_set_lr_multiplies_the_scale_of_each_group():
    model = BeitForMim(TINY, seed=0)
    groups = param_groups(model, weight_decay=0.05, layer_decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_lr(optimizer, 0.1)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"])


def test_missing_apex_is_an_error_that_offers_adamw():
    with pytest.raises(ValueError, match="--optimizer adamw"):
        build_optimizer(BeitForMim(TINY), OptimizerConfig(optimizer="apex"))


@pytest.fixture
def apex_stand_in(tmp_path, monkeypatch):
    """A package laid out like NVIDIA's apex whose FusedAdam is written in plain PyTorch."""
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "amp_C.py").touch()
    (tmp_path / "apex" / "optimizers" / "__init__.py").write_text(
        "from apex.optimizers.fused_adam import FusedAdam\n"
    )
    (tmp_path / "apex" / "optimizers" / "fused_adam.py").write_text(
        textwrap.dedent("""
            import torch

            class FusedAdam(torch.optim.Optimizer):
                def __init__(self, params, lr, betas, eps, adam_w_mode, weight_decay=0.0):
                    assert adam_w_mode
                    super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

                @torch.no_grad()
                def step(self):
                    for group in self.param_groups:
                        group["step"] = group.get("step", 0) + 1
                        b1, b2 = group["betas"]
                        for p in group["params"]:
                            m, v = (self.state[p][k] for k in ("exp_avg", "exp_avg_sq"))
                            m.mul_(b1).add_(p.grad, alpha=1 - b1)
                            v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                            mean = m / (1 - b1 ** group["step"])
                            root = (v / (1 - b2 ** group["step"])).sqrt() + group["eps"]
                            p.sub_(group["lr"] * (mean / root + group["weight_decay"] * p))
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [n for n in sys.modules if n.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


@pytest.mark.usefixtures("apex_stand_in")
def test_apex_wrapper_steps_like_adamw_and_shares_its_state_layout():
    mine, plain = BeitForMim(TINY, seed=0), BeitForMim(TINY, seed=0)
    fused = build_optimizer(mine, OptimizerConfig(optimizer="apex", lr=1e-2))
    adamw = build_optimizer(plain, OptimizerConfig(lr=1e-2))
    for step in range(3):
        for model, optimizer in ((mine, fused), (plain, adamw)):
            gradients(model, step)
            scaled_step(optimizer, torch.tensor(2.0), torch.tensor(float(step == 1)))
    for a, b in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    states = optimizer_tensors(fused), optimizer_tensors(adamw)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-6)
