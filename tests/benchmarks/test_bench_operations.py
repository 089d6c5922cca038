"""Each operation's own part: its definition is the reference's, its checks catch what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.call import Call, Function, Outputs, results
from benchmarks.gpu.correctness import check_case
from benchmarks.gpu.integration import check_integration
from benchmarks.operation import Case, Operation
from benchmarks.operations import (
    OPERATIONS,
    convolution,
    cross_entropy,
    embedding,
    gelu,
    layer_norm,
    linear_argmax,
)

CPU = torch.device("cpu")
CASES = [(operation, case) for operation in OPERATIONS for case in operation.cases]
NORM, LOSS = layer_norm.OPERATION, cross_entropy.OPERATION
ARGMAX, EMBED = linear_argmax.OPERATION, embedding.OPERATION
CONV, GELU = convolution.OPERATION, gelu.OPERATION


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)
def test_the_definition_is_the_references(operation: Operation) -> None:
    """In float64, for every case; but what the reference computes in fp32 by its own words: the
    loss, and the table's way to the bias."""
    reference = operation.ours("reference")
    for case in operation.cases:
        call = case.shrunk().make("float32", 3, CPU).to(torch.float64)
        truth = results(operation.definition, call)
        for name, found in results(reference, call).items():
            if not found.is_floating_point():
                assert torch.equal(found, truth[name]), (case.name, name)
                continue
            exact = operation is not LOSS and "table" not in call.leaves
            error = (found - truth[name]).norm() / truth[name].norm().clamp_min(1e-30)
            assert error <= (1e-13 if exact else 3e-6), (case.name, name)


def case_of(operation: Operation, name: str) -> Case:
    return next(case for case in operation.cases if case.name == name).shrunk()


def right(operation: Operation) -> Function:
    """In float64 and rounded once: a stand-in that is right."""
    reference = operation.ours("reference")

    def function(call: Call) -> Outputs:
        with torch.no_grad():
            dtypes = {name: tensor.dtype for name, tensor in reference(call).items()}
        wide = operation.definition(call.to(torch.float64))
        return {name: wide[name].to(dtype) for name, dtype in dtypes.items()}

    return function


def statuses(operation: Operation, case: Case, function: Function) -> dict[str, str]:
    rows: list[dict[str, Any]] = []
    check_case(operation, case, "float32", CPU, rows.append, function)
    return {row["check"]: row["status"] for row in rows}


EVERY = {"error", "repeatable", "writes everything", "reads nothing else"}
OWN = [
    (NORM, "LayerNorm of BEiT-B", {"batch independent"}),
    (NORM, "LayerNorm of one row", set()),
    (LOSS, "loss of BEiT-B", {"empty slots"}),
    (LOSS, "loss, rows selected", {"empty slots"}),
    (LOSS, "loss, repeated positions", {"empty slots"}),
    (LOSS, "loss, no filled slot", {"empty slots"}),
    (ARGMAX, "argmax, ties", {"batch independent", "lowest of equals"}),
    (ARGMAX, "argmax, ragged", {"batch independent"}),
    (GELU, "GELU of BEiT-B", {"batch independent"}),
    (CONV, "first of a block at 112²", {"batch independent"}),
    (CONV, "end of a block, odd sizes", {"batch independent"}),
    (EMBED, "patches of BEiT", {"batch independent", "masked pixels"}),
    (EMBED, "patches, all masked", {"batch independent", "masked pixels"}),
    (EMBED, "patches, no masking", {"batch independent"}),
]


@pytest.mark.parametrize(
    ("operation", "case", "own"), OWN, ids=lambda one: getattr(one, "name", one)
)
def test_a_right_operation_passes_everything(
    operation: Operation, case: str, own: set[str]
) -> None:
    found = statuses(operation, case_of(operation, case), right(operation))
    assert set(found) == EVERY | own
    assert set(found.values()) == {"pass"}, found


def changed(operation: Operation, **changes: Callable[[Call, Tensor], Tensor]) -> Function:
    """The right outputs, some of them changed."""
    exact = right(operation)

    def function(call: Call) -> Outputs:
        outputs = exact(call)
        return {n: changes[n](call, x) if n in changes else x for n, x in outputs.items()}

    return function


def with_call(operation: Operation, change: Callable[[Call], Call]) -> Function:
    """Right, of another call."""
    exact = right(operation)
    return lambda call: exact(change(call))


def deaf(name: str) -> Callable[[Call], Call]:
    """No gradient reaches the leaf."""

    def change(call: Call) -> Call:
        leaf = call.leaves[name]
        return replace(call, leaves={**call.leaves, name: leaf.detach() + 0 * leaf})

    return change


def without(name: str) -> Callable[[Call], Call]:
    return lambda call: replace(call, given={n: x for n, x in call.given.items() if n != name})


def unsmoothed(call: Call) -> Call:
    return replace(call, shape=replace(call.shape, smoothing=0.0))


def by_tanh(call: Call, _out: Tensor) -> Tensor:
    z = call.leaves["x"] + call.leaves["bias"]
    return torch.nn.functional.gelu(z, approximate="tanh")


def without_relu(call: Call) -> Call:
    return replace(call, shape=replace(call.shape, relu_input=False))


def over_all_slots(call: Call, loss: Tensor) -> Tensor:
    targets = call.given["targets"]
    filled = (targets >= 0) & (call.given["positions"] >= 0)
    return loss * filled.sum() / targets.numel()


def another_row(call: Call) -> Call:
    positions = call.given["positions"]
    moved = torch.where(positions > 0, positions - 1, positions)
    return replace(call, given={**call.given, "positions": moved})


def greedy(name: str) -> Callable[[Call, Tensor], Tensor]:
    """Looks at all of an input, as a load without a mask does."""
    return lambda call, out: out + 0 * call.tensor(name).sum().detach().to(out.dtype)


def in_bf16(call: Call, _index: Tensor) -> Tensor:
    scores = linear_argmax.by_definition(call)["scores"].bfloat16()
    return scores.float().argmax(-1)


def last_of_equals(call: Call, _index: Tensor) -> Tensor:
    scores = linear_argmax.by_definition(call)["scores"]
    return scores.shape[1] - 1 - scores.flip(1).argmax(-1)


def mixing(call: Call, out: Tensor) -> Tensor:
    return out * (1 + 1e-6 * call.size)


WRONG = [
    (NORM, "LayerNorm of BEiT-B", changed(NORM, normed=lambda _, x: x * 1.00001), "error"),
    (NORM, "LayerNorm of BEiT-B", with_call(NORM, without("drop_scale")), "error"),
    (NORM, "LayerNorm of BEiT-B", with_call(NORM, deaf("gamma")), "error"),
    (NORM, "LayerNorm of BEiT-B", changed(NORM, y=lambda _, y: y.detach() + 0 * y), "error"),
    (NORM, "LayerNorm of BEiT-B", changed(NORM, y=mixing), "batch independent"),
    (NORM, "LayerNorm alone", with_call(NORM, deaf("bias")), "error"),
    (LOSS, "loss of BEiT-B", changed(LOSS, loss=over_all_slots), "error"),
    (LOSS, "loss of BEiT-B", changed(LOSS, correct=lambda _, n: n - 1), "error"),
    (LOSS, "loss of BEiT-B", changed(LOSS, count=lambda _, n: n + 1), "error"),
    (LOSS, "loss of BEiT-B", with_call(LOSS, another_row), "error"),
    (LOSS, "loss, label smoothing", with_call(LOSS, unsmoothed), "error"),
    (LOSS, "loss, no filled slot", changed(LOSS, loss=lambda _, x: x * float("nan")), "error"),
    (LOSS, "loss of BEiT-B", changed(LOSS, loss=greedy("hidden")), "empty slots"),
    (ARGMAX, "argmax, ragged", changed(ARGMAX, index=lambda _, i: (i + 1) % 70), "error"),
    (ARGMAX, "argmax of a tokenizer", changed(ARGMAX, index=lambda _, i: i.int()), "error"),
    (ARGMAX, "argmax of a tokenizer", changed(ARGMAX, index=lambda _, i: i - 1000), "error"),
    (ARGMAX, "argmax, ties", changed(ARGMAX, index=last_of_equals), "lowest of equals"),
    (GELU, "GELU of BEiT-B", with_call(GELU, deaf("bias")), "error"),
    (GELU, "GELU, tails", changed(GELU, out=by_tanh), "error"),
    (CONV, "end of a block at 112²", with_call(CONV, without("residual")), "error"),
    (CONV, "first of a block at 112²", with_call(CONV, without_relu), "error"),
    (CONV, "convolution at 112²", changed(CONV, out=lambda _, x: x.roll(1, 3)), "error"),
    (EMBED, "patches of BEiT", with_call(EMBED, another_row), "error"),
    (EMBED, "patches of BEiT", with_call(EMBED, deaf("mask_token")), "error"),
    (EMBED, "patches, small", with_call(EMBED, deaf("pos_embed")), "error"),
    (EMBED, "patches of BEiT", changed(EMBED, out=greedy("images")), "masked pixels"),
    (
        EMBED,
        "patches of BEiT",
        changed(EMBED, out=lambda c, x: x * (1 + 1e-5 * c.size)),
        "batch independent",
    ),
]


@pytest.mark.parametrize(("operation", "case", "function", "check"), WRONG)
def test_a_wrong_operation_is_caught(
    operation: Operation, case: str, function: Function, check: str
) -> None:
    assert statuses(operation, case_of(operation, case), function)[check] == "fail"


def test_a_choice_by_rounded_scores_is_caught() -> None:
    """Among 8,192 classes bf16 ties by the dozen; no tolerance hides that."""
    case = replace(
        case_of(ARGMAX, "argmax of a tokenizer"), shape=linear_argmax.Scores(64, 32, 8192)
    )
    rounded = changed(ARGMAX, index=in_bf16)
    assert statuses(ARGMAX, case, right(ARGMAX))["error"] == "pass"
    assert statuses(ARGMAX, case, rounded)["error"] == "fail"
    call = case.make("float32", 0, CPU)
    truth = linear_argmax.by_definition(call)
    assert linear_argmax.error(call, rounded(call), truth) > ARGMAX.error_allowed
    assert linear_argmax.error(call, truth, truth) == 0.0


def test_a_loss_that_plain_pytorch_meets_by_chance_is_no_bound() -> None:
    """A few units in the last place pass, a millionth doesn't."""
    call = case_of(LOSS, "loss of BEiT-B").make("float32", 0, CPU)
    truth = results(LOSS.definition, call.to(torch.float64))
    lucky = {name: tensor.float() for name, tensor in truth.items()}
    for error, passes in ((3e-7, True), (1e-6, False), (-1e-6, False)):
        mine = results(right(LOSS), call)
        mine["loss"] = truth["loss"] * (1 + error)
        assert (not LOSS.judge(call, mine, lucky, truth).reasons) == passes


def test_right_answers_are_counted_and_doubtful_ones_allowed_for() -> None:
    """Half of the images have the best class as a target; a tie of scores may go either way."""
    call = case_of(LOSS, "loss of BEiT-B").make("float32", 0, CPU)
    truth = results(LOSS.definition, call.to(torch.float64))
    assert 0 < int(truth["correct"]) < int(truth["count"])
    filled = int(cross_entropy.shapes.filled_slots(call).sum())
    mine = results(right(LOSS), call)
    doubtful = {**truth, "lead": torch.zeros_like(truth["lead"])}
    for correct in (0, filled):
        claimed = {**mine, "correct": torch.tensor(correct)}
        assert LOSS.judge(call, claimed, mine, truth).reasons
        assert not LOSS.judge(call, claimed, mine, doubtful).reasons
    too_many = {**mine, "correct": torch.tensor(filled + 1)}
    assert LOSS.judge(call, too_many, mine, doubtful).reasons


def test_shapes_that_matter_are_cases() -> None:
    shapes = {op.name: [case.shape for case in op.cases] for op in OPERATIONS}
    norms, losses = shapes[NORM.name], shapes[LOSS.name]
    assert {(128, 197, 768), (1, 1, 768)} <= {(s.batch, s.tokens, s.width) for s in norms}
    assert any(s.width % 2 for s in norms) and any(s.width == 1024 for s in norms)
    for lacking in ("branch", "gamma", "drop", "bias", "norm"):
        assert not all(getattr(s, lacking) for s in norms)
    assert any(s.stream == "float32" for s in norms) and any(s.mean for s in norms)
    assert {10, 1000, 8192, 65_536} <= {s.classes for s in losses}
    assert any(s.rows == 9600 and s.classes == 8192 and s.width == 768 for s in losses)
    assert any(s.smoothing == 0.1 for s in losses) and any(s.repeated for s in losses)
    assert any(s.empty == "all" for s in losses) and any(s.scale > 100 for s in losses)
    choices, patches = shapes[ARGMAX.name], shapes[EMBED.name]
    assert any((s.rows, s.width, s.classes) == (9600, 2048, 8192) for s in choices)
    assert any(s.ties for s in choices)
    assert {14, 16} <= {s.patch for s in patches} and {75, 196, None} <= {s.masked for s in patches}
    assert {s.patch for s in patches if s.channels_last} == {14, 16}
    for operation in OPERATIONS:
        assert any(case.machinery for case in operation.cases), operation.name
        assert any(case.sanitized for case in operation.cases), operation.name


@pytest.mark.parametrize(
    ("operation", "case"),
    [
        (NORM, "LayerNorm, odd width"),
        (LOSS, "loss of BEiT-B"),
        (ARGMAX, "argmax, ties"),
        (EMBED, "patches, small"),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_kernels_pass_under_the_interpreter(operation: Operation, case: str) -> None:
    found = statuses(operation, case_of(operation, case), operation.ours("triton"))
    assert set(found.values()) == {"pass"}, found


def test_machinery_is_checked_for_every_operation() -> None:
    for operation in (EMBED, ARGMAX):
        rows: list[dict[str, Any]] = []
        case = next(case for case in operation.cases if case.machinery).shrunk()
        check_integration(operation, case, "float32", CPU, rows.append)
        found = {row["check"]: row["status"] for row in rows}
        assert found.pop("CUDA graph") == "skipped"
        # What has no gradient needs no checkpoint.
        recomputed = {"checkpointing"} if operation is EMBED else set()
        assert found == dict.fromkeys({"torch.compile", "autocast"} | recomputed, "pass"), rows
