"""Whoever is timed on a student or a step computes the same, and who doesn't is caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.peers import Unavailable
from benchmarks.roofline import Work
from benchmarks.steps import expected, official, optimizer_steps, students, tokenizers
from benchmarks.steps.optimizer_steps import Levers, Step
from benchmarks.steps.problem import BASE, CPU, TINY, base_for, demo, emulated, masked_map
from fastbeit.model import BeitConfig
from fastbeit.training.distributed import World

FP32 = torch.float32
STUDENTS: dict[str, Callable[..., students.Student]] = {
    "reference": students.reference,
    "fast": students.fast,
    "official style": students.official_style,
    "transformers, eager": partial(students.transformers, attention="eager"),
    "transformers, sdpa": partial(students.transformers, attention="sdpa"),
    "timm": students.timm,
}


def built(name: str) -> students.Student:
    try:
        return STUDENTS[name](TINY, CPU, FP32)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def wanted() -> expected.Expected:
    return expected.numbers(TINY, "cpu")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    threads = torch.get_num_threads()
    with optimizer_steps.one_process() as found:
        assert torch.get_num_threads() == threads
        yield found


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_finds_the_same_loss_and_gradients(
    name: str, wanted: expected.Expected
) -> None:
    student, batch = built(name), TINY.batch_on()
    codes = expected.targets(TINY, "cpu")
    expected.assert_forward(student, batch, wanted, 1e-5)
    for _ in range(2):  # gradients replace those of before
        expected.assert_both(student, batch, codes, wanted, 1e-5)


@pytest.mark.parametrize(
    "build",
    [students.transformers_compiled, students.timm_compiled, students.compiled(students.fast)],
)
def test_every_block_is_compiled_and_nothing_else(
    build: Callable[..., students.Student], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[torch.nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: made.append((module, options))
    )
    try:
        build(TINY, CPU, FP32)
    except Unavailable as error:
        pytest.skip(str(error))
    assert len(made) == TINY.model.depth and len({type(module) for module, _ in made}) == 1
    assert all(options == {"dynamic": False} for _, options in made)


def test_masks_leave_empty_slots_and_tokens_differ() -> None:
    """Or neither would be compared."""
    batch, codes = TINY.batch_on(), expected.targets(TINY, "cpu")
    assert (batch.positions < 0).any() and (batch.positions >= 0).any()
    assert torch.equal(codes >= 0, batch.positions >= 0)
    assert len(codes.unique()) > 6


def test_the_table_keeps_its_precision_in_16_bits() -> None:
    """As training has it; other weights are rounded in every call, gradients aren't."""
    student = students.fast(TINY, CPU, torch.bfloat16)
    used: dict[str, torch.dtype] = {}

    def look(*_: Any) -> None:
        used.update({name: p.dtype for name, p in student.module.named_parameters()})

    next(iter(students.blocks_of(student))).register_forward_pre_hook(look)
    student.both(TINY.batch_on(), expected.targets(TINY, "cpu"))
    assert used.pop("rel_pos_bias.relative_position_bias_table") == torch.float32
    assert set(used.values()) == {torch.bfloat16}
    assert {p.dtype for p in student.module.parameters()} == {torch.float32}
    assert student.patch_weight.grad is not None
    assert student.patch_weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "parameter",
    ["mask_token", "blocks.0.gamma_1", "rel_pos_bias.relative_position_bias_table", "lm_head.bias"],
)
def test_a_student_with_other_weights_is_caught(parameter: str, wanted: expected.Expected) -> None:
    student = students.fast(TINY, CPU, FP32)
    changed = student.module.get_parameter(parameter)
    with torch.no_grad():
        changed.add_(0.01 * torch.randn(changed.shape, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(AssertionError, match="logits are"):
        expected.assert_forward(student, TINY.batch_on(), wanted, 1e-5)


def test_wrong_gradients_are_caught(wanted: expected.Expected) -> None:
    """One that doesn't reach the first block, and a loss over other targets."""
    codes, batch = expected.targets(TINY, "cpu"), TINY.batch_on()
    student = students.fast(TINY, CPU, FP32)
    next(iter(students.blocks_of(student))).register_forward_hook(
        lambda _module, _given, out: (out[0].detach().requires_grad_(), out[1])
    )
    with pytest.raises(AssertionError, match="gradient norm"):
        expected.assert_both(student, batch, codes, wanted, 1e-5)
    with pytest.raises(AssertionError, match="loss"):
        other = codes.where(codes < 0, (codes + 1) % TINY.dvae.codes)
        expected.assert_both(students.fast(TINY, CPU, FP32), batch, other, wanted, 1e-5)


def test_tokenizers_agree_and_others_are_caught() -> None:
    batch, truth = TINY.batch_on(), expected.targets(TINY, "cpu")
    for build in (tokenizers.ours, tokenizers.masked_head):
        assert tokenizers.equal_share(build(TINY, CPU, FP32)(batch), truth) == 1.0
    moved = truth.where(truth < 0, (truth + 1) % TINY.dvae.codes)
    assert tokenizers.equal_share(moved, truth) == 0.0
    with pytest.raises(AssertionError, match="another set of slots"):
        tokenizers.equal_share(truth.abs(), truth)


def steps(world: World) -> dict[str, Step]:
    found: dict[str, Step] = {
        "reference": optimizer_steps.ours(TINY, world, FP32, Levers()),
        "fast": optimizer_steps.ours(
            TINY, world, FP32, Levers(pruning=True, head=True, channels_last=True, auto=True)
        ),
        "official style": optimizer_steps.official_style(TINY, built("official style"), CPU),
    }
    for name in ("transformers, sdpa", "timm"):
        try:
            student = STUDENTS[name](TINY, CPU, FP32)
        except Unavailable:
            continue
        found[name] = optimizer_steps.best_of_others(TINY, student, CPU, FP32)
    return found


def test_three_steps_of_all_go_the_same_way(world: World, wanted: expected.Expected) -> None:
    """Loss and norm of the first step, and after each update: clip, decay and AdamW agree too."""
    taken = {
        name: torch.tensor([[value.item() for value in step()] for _ in range(3)])
        for name, step in steps(world).items()
    }
    reference = taken["reference"]
    assert reference[0].tolist() == pytest.approx([wanted.loss, wanted.gradient_norm], rel=1e-5)
    assert reference[2, 0] < reference[1, 0] < reference[0, 0]
    assert wanted.gradient_norm > optimizer_steps.OPTIMIZER.clip_norm  # or no clip is compared
    for name, numbers in taken.items():
        assert torch.allclose(numbers, reference, rtol=1e-4, atol=0), f"{name}: {numbers}"


def test_the_official_update_stops_at_a_loss_that_is_not_finite() -> None:
    student = students.official_style(TINY, CPU, FP32)
    optimizer = torch.optim.AdamW(student.module.parameters(), lr=1e-3)
    logits = student.logits(TINY.batch_on()) * float("nan")
    labels = torch.zeros(len(logits), dtype=torch.int64)
    with pytest.raises(RuntimeError, match="the loss is nan"):
        official.update(student.module, optimizer, logits, labels, 3.0)


@pytest.mark.parametrize("changes", [{"position": "absolute"}, {"layer_scale": None}], ids=str)
def test_the_official_student_is_of_one_architecture(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="written for a shared relative table and LayerScale"):
        official.OfficialStyle(BeitConfig(**changes))


def test_masked_map_of_positions() -> None:
    positions = torch.tensor([[0, 3, -1], [2, -1, -1]], dtype=torch.int32)
    assert masked_map(positions, 4).tolist() == [
        [True, False, False, True],
        [False, False, True, False],
    ]


def test_work_is_that_of_the_formulas() -> None:
    """By hand for ViT-B: 108 GFLOP an image without pruning, less 4 % of the block linears' 100;
    the tokenizer's 52.1 without the head on 121 of 196 patches."""
    assert BASE.both_work().flops / BASE.batch == pytest.approx(104e9, rel=0.02)
    assert BASE.tokenizer_work().flops / BASE.batch == pytest.approx(48.06e9, rel=0.002)
    model = TINY.student()
    trained = sum(p.numel() for p in model.parameters()) - TINY.model.depth * TINY.model.width
    images = 4 * TINY.batch_on().images.numel()
    assert TINY.forward_work().bytes == 4 * trained + images
    assert TINY.both_work().bytes == 12 * trained + 2 * images
    encoder = 4 * sum(p.numel() for p in TINY.encoder().parameters())
    pixels = 4 * TINY.batch_on().token_images.numel()
    assert TINY.tokenizer_work().bytes == encoder + pixels
    half = torch.bfloat16
    assert TINY.forward_work(half).bytes == 4 * trained + images // 2
    assert TINY.both_work(half).bytes == 10 * trained + images
    assert TINY.tokenizer_work(half).bytes == (encoder + pixels) // 2
    updated = TINY.tokenizer_work() + TINY.both_work() + Work(0, 28 * trained)
    assert TINY.step_work() == updated


def test_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_for("cpu") is BASE and base_for("cuda").batch > BASE.batch
    monkeypatch.setenv("FASTBEIT_BENCH_TINY", "1")
    assert base_for("cpu") is TINY
    assert demo().model.vocab_size == demo().dvae.codes
    first, second = TINY.student(), TINY.student()
    with torch.no_grad():
        first.cls_token.add_(1)
    assert not torch.equal(first.cls_token, second.cls_token)  # each a model of one's own


def test_what_would_be_emulated_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbeit.environment.cpu_bf16", lambda: None)
    assert "no bfloat16 products" in str(emulated("cpu", torch.bfloat16))
    monkeypatch.setattr("fastbeit.environment.cpu_bf16", lambda: "AMX")
    assert emulated("cpu", torch.bfloat16) is None
    assert "no float16 products" in str(emulated("cpu", torch.float16))
    assert emulated("cpu", torch.float32) is None and emulated("cuda", torch.bfloat16) is None


def test_what_is_kept_lies_in_the_hosts_memory(wanted: expected.Expected) -> None:
    """On the device it would count in the peak of every later row."""
    assert wanted.logits.device == wanted.patch_gradient.device == CPU
