"""The judge of correctness can fail: wrong operations of many kinds are caught, right ones pass."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.call import Call, Function, Outputs, results
from benchmarks.gpu import integration
from benchmarks.gpu.correctness import check_case, fresh_memory_is_nan, surrounded
from benchmarks.judge import judge
from benchmarks.operation import Case
from benchmarks.operations import attention
from benchmarks.operations.attention import OPERATION, definition
from benchmarks.operations.attention.cases import CASES
from benchmarks.operations.attention.forms import by_definition
from benchmarks.operations.attention.shapes import Attention, qkv
from fastbeit.model.positions import relative_index

CPU = torch.device("cpu")
SMALL = Case("small", "", Attention(3, 2, 9, 9, width=8), ("float32",), 1)
SUBSET = replace(SMALL, name="subset", shape=replace(SMALL.shape, queries=4, subset=True))


def statuses(case: Case, function: Function) -> dict[str, str]:
    rows: list[dict[str, Any]] = []
    check_case(OPERATION, case, "float32", CPU, rows.append, function)
    return {row["check"]: row["status"] for row in rows}


def failed(case: Case, function: Function) -> set[str]:
    return {check for check, status in statuses(case, function).items() if status == "fail"}


def changed(change: Any) -> Function:
    """The right outputs, changed."""

    def function(call: Call) -> Outputs:
        return {"out": change(call, exact(call)["out"])}

    return function


def exact(call: Call) -> Outputs:
    """In float64 and rounded once: a stand-in that is right."""
    out = by_definition(call.to(torch.float64))["out"]
    return {"out": out.to(call.douts["out"].dtype if call.douts else torch.float32)}


@pytest.mark.parametrize("case", [SMALL, SUBSET], ids=lambda case: case.name)
def test_a_right_operation_passes_everything(case: Case) -> None:
    found = statuses(case, exact)
    assert set(found.values()) == {"pass"}
    wanted = {"error", "repeatable", "writes everything", "batch independent", "reads nothing else"}
    assert wanted | ({"empty slots"} if case.shape.subset else set()) == set(found)


def without_bias_gradient(call: Call) -> Outputs:
    bias = call.leaves["bias"]
    leaves = {**call.leaves, "bias": bias.detach() + 0 * bias}
    return exact(replace(call, leaves=leaves))


def one_element_off(call: Call, out: Tensor) -> Tensor:
    off = torch.zeros_like(out)
    off[0, 3, 0, 0] = 1e-4
    return out + off


CALLS_SO_FAR = itertools.count(1)


def never_repeating(_call: Call, out: Tensor) -> Tensor:
    return out * (1 + 1e-6 * next(CALLS_SO_FAR))


def mixing_images(call: Call, out: Tensor) -> Tensor:
    return out + 1e-7 * call.leaves["v"].mean() * call.leaves["q"].shape[0]


@pytest.mark.parametrize(
    ("function", "check"),
    [
        (changed(lambda _, out: out * 1.00001), "error"),
        (without_bias_gradient, "error"),
        (changed(one_element_off), "error"),
        (changed(never_repeating), "repeatable"),
        (changed(mixing_images), "batch independent"),
    ],
)
def test_a_wrong_operation_is_caught(function: Function, check: str) -> None:
    assert check in failed(SMALL, function)


def test_an_unwritten_element_is_caught() -> None:
    class Leaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            fresh = torch.empty_like(out)
            fresh[:, 1:] = out[:, 1:]
            # By luck the memory held the right values before.
            return fresh if not fresh[:, 0].isfinite().all() else out.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    leaky = changed(lambda _, out: Leaky.apply(out))
    assert "writes everything" in failed(SMALL, leaky)
    with fresh_memory_is_nan():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_reading_beside_a_tensor_is_caught() -> None:
    def greedy(call: Call, out: Tensor) -> Tensor:
        q = call.leaves["q"]
        beyond = q.as_strided((1,), (1,), q.untyped_storage().nbytes() // 4 - 1)
        return out + 0 * beyond.detach()

    assert "reads nothing else" in failed(SMALL, changed(greedy))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_values_among_nan_keep_their_order_in_memory(order: torch.memory_format) -> None:
    tensor = torch.randn(2, 3, 4, 5).contiguous(memory_format=order)
    inside = surrounded(tensor, float("nan"))
    assert torch.equal(inside, tensor)
    assert inside._base is not None and inside._base.isnan().any()
    ranks = [sorted(range(4), key=lambda dim: x.stride(dim)) for x in (inside, tensor)]
    assert ranks[0] == ranks[1] and min(inside.stride()) == 1


def test_what_lies_in_an_empty_slot_must_not_matter() -> None:
    careless = changed(lambda call, out: out + 0 * call.leaves["q"].sum().detach())
    assert "empty slots" in failed(SUBSET, careless)


def test_nan_and_wrong_shapes_never_pass() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    nan = torch.tensor([1.0, float("nan"), 1.0])
    assert "finite" in judge(nan, torch.ones(3), truth, torch.float32).reason
    assert not judge(nan, nan, truth, torch.float32).passed
    assert judge(torch.ones(3), torch.ones(3), truth, torch.float32).passed
    assert "shape" in judge(torch.ones(1, 3), torch.ones(3), truth, torch.float32).reason


def test_the_bound_is_twice_plain_pytorchs_error() -> None:
    truth = torch.full((1000,), 1.0, dtype=torch.float64)
    plain = truth + 1e-3
    assert judge(truth + 1.9e-3, plain, truth, torch.float32).passed
    assert "over 2 times" in judge(truth + 2.1e-3, plain, truth, torch.float32).reason
    spike = truth.clone()
    spike[7] += 5e-3
    assert "largest error" in judge(spike, plain, truth, torch.float32).reason


def test_truth_in_parts_is_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    by_image = replace(SMALL, shape=replace(SMALL.shape, bias="images"))
    for case in (SMALL, by_image, SUBSET, CASES[4].shrunk()):
        call = case.make("float32", 0, CPU)
        whole = results(by_definition, call.to(torch.float64))
        monkeypatch.setattr(attention, "TRUTH_ELEMENTS", 1)
        for name, tensor in OPERATION.truth(by_definition, call).items():
            torch.testing.assert_close(tensor, whole[name])
        monkeypatch.undo()


def test_the_definition_is_the_formula() -> None:
    """Against loops over images, heads and queries."""
    call = SUBSET.make("float32", 5, CPU)
    q, k, v = (x.double() for x in qkv(call))
    bias, positions = call.leaves["bias"].double(), call.given["positions"]
    out = by_definition(call.to(torch.float64))["out"]
    for image in range(SUBSET.shape.batch):
        for head in range(SUBSET.shape.heads):
            for slot, row in enumerate(positions[image].tolist()):
                expected = torch.zeros(SUBSET.shape.width, dtype=torch.float64)
                if row >= 0:
                    scores = k[image, :, head] @ q[image, slot, head] / SUBSET.shape.width**0.5
                    weights = (scores + bias[head, row]).exp()
                    expected = weights / weights.sum() @ v[image, :, head]
                torch.testing.assert_close(out[image, slot, head], expected)


@pytest.mark.parametrize("grid", [(14, 14), (5, 7), (1, 3)])
def test_the_index_is_the_models(grid: tuple[int, int]) -> None:
    assert torch.equal(definition.relative_index(grid), relative_index(grid))
    assert definition.relative_index(grid).max() == definition.table_rows(grid) - 1


def test_every_shape_that_matters_is_a_case() -> None:
    shapes = [case.shape for case in CASES]
    assert {197, 50, 65, 577, 1601, 36, 1, 75} <= {shape.queries for shape in shapes}
    assert any(shape.batch == 1 for shape in shapes) and any(shape.subset for shape in shapes)
    assert {"attention", "packed", "table", "packed table", "expand"} == {s.kind for s in shapes}
    assert (CASES[1].make("bfloat16", 0, CPU).given["positions"] < 0).any()


def test_kernels_pass_under_the_interpreter() -> None:
    """The real operations, on the smallest cases of each kind."""
    for name in ("5 x 7 grid", "expand 5 x 7", "65 tokens"):
        case = next(case for case in CASES if case.name == name).shrunk()
        assert failed(case, OPERATION.ours("triton")) == set(), name


def test_integration_checks_can_fail() -> None:
    call = SMALL.make("float32", 0, CPU)
    state = iter(range(1000))
    forgetful = changed(lambda _, out: out * (1 + 0.01 * next(state)))

    assert integration.under_checkpoint(call, exact) == ""
    assert "differ" in integration.under_checkpoint(call, forgetful)
    assert integration.under_compile(call, "aot_eager", exact) == ""
    assert "expected" in integration.under_autocast(call, OPERATION.cast, in_own_precision)

    def breaking(call: Call) -> Outputs:
        if call.leaves["q"].sum().item() > 0:
            return exact(call)
        return {"out": exact(call)["out"] + 0}

    with pytest.raises(Exception, match=r"(?i)graph|item|dynamic"):
        integration.under_compile(call, "aot_eager", breaking)


def in_own_precision(call: Call) -> Outputs:
    """Deaf to autocast: the result is as wide as the inputs."""
    return {"out": by_definition(call.to(torch.float64))["out"].to(call.leaves["q"].dtype)}
