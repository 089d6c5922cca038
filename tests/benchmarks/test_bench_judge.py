"""The judge of correctness can fail: wrong operations of many kinds are caught, right ones pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import definition
from benchmarks.gpu import cases, integration
from benchmarks.gpu.cases import CASES, Call, Case, by_definition, make_call
from benchmarks.gpu.correctness import check_case, fresh_memory_is_nan, results, truth_of
from benchmarks.gpu.judge import judge
from fastbeit.model.positions import relative_index

CPU = torch.device("cpu")
SMALL = Case("small", "", 3, 2, 9, 9, width=8, dtypes=("float32",), seeds=1)
SUBSET = replace(SMALL, name="subset", queries=4, subset=True)


def statuses(case: Case, operation: Callable[[Call], Tensor]) -> dict[str, str]:
    rows: list[dict[str, Any]] = []
    check_case(case, "float32", CPU, rows.append, operation)
    return {row["check"]: row["status"] for row in rows}


def failed(case: Case, operation: Callable[[Call], Tensor]) -> set[str]:
    return {check for check, status in statuses(case, operation).items() if status == "fail"}


def exact(call: Call) -> Tensor:
    """In float64 and rounded once: a stand-in that is right."""
    return by_definition(call.to(torch.float64)).to(call.dout.dtype)


@pytest.mark.parametrize("case", [SMALL, SUBSET], ids=lambda case: case.name)
def test_a_right_operation_passes_everything(case: Case) -> None:
    found = statuses(case, exact)
    assert set(found.values()) == {"pass"}
    wanted = {"error", "repeatable", "writes everything", "batch independent", "reads nothing else"}
    assert wanted | ({"empty slots"} if case.subset else set()) == set(found)


def scaled(call: Call) -> Tensor:
    return exact(call) * 1.00001


def without_bias_gradient(call: Call) -> Tensor:
    bias = call.leaves["bias"]
    leaves = {**call.leaves, "bias": bias.detach() + 0 * bias}
    return exact(replace(call, leaves=leaves))


def one_element_off(call: Call) -> Tensor:
    off = torch.zeros_like(call.dout)
    off[0, 3, 0, 0] = 1e-4
    return exact(call) + off


CALLS_SO_FAR = itertools.count(1)


def never_repeating(call: Call) -> Tensor:
    return exact(call) * (1 + 1e-6 * next(CALLS_SO_FAR))


def mixing_images(call: Call) -> Tensor:
    return exact(call) + 1e-7 * call.leaves["v"].mean() * call.leaves["q"].shape[0]


@pytest.mark.parametrize(
    ("operation", "check"),
    [
        (scaled, "error"),
        (without_bias_gradient, "error"),
        (one_element_off, "error"),
        (never_repeating, "repeatable"),
        (mixing_images, "batch independent"),
    ],
)
def test_a_wrong_operation_is_caught(operation: Callable[[Call], Tensor], check: str) -> None:
    assert check in failed(SMALL, operation)


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

    assert "writes everything" in failed(SMALL, lambda call: Leaky.apply(exact(call)))
    with fresh_memory_is_nan():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_reading_beside_a_tensor_is_caught() -> None:
    def greedy(call: Call) -> Tensor:
        q = call.leaves["q"]
        beyond = q.as_strided((1,), (1,), q.untyped_storage().nbytes() // 4 - 1)
        return exact(call) + 0 * beyond.detach()

    assert "reads nothing else" in failed(SMALL, greedy)


def test_what_lies_in_an_empty_slot_must_not_matter() -> None:
    def careless(call: Call) -> Tensor:
        return exact(call) + 0 * call.leaves["q"].sum().detach()

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
    for case in (SMALL, replace(SMALL, bias="images"), SUBSET, CASES[4].shrunk()):
        call = make_call(case, "float32", 0, CPU)
        whole = results(by_definition, call.to(torch.float64))
        monkeypatch.setattr("benchmarks.gpu.correctness.TRUTH_ELEMENTS", 1)
        for name, tensor in truth_of(call).items():
            torch.testing.assert_close(tensor, whole[name])
        monkeypatch.undo()


def test_the_definition_is_the_formula() -> None:
    """Against loops over images, heads and queries."""
    call = make_call(SUBSET, "float32", 5, CPU)
    q, k, v = (x.double() for x in call.qkv())
    bias, positions = call.leaves["bias"].double(), call.positions
    assert positions is not None
    out = by_definition(call.to(torch.float64))
    for image in range(SUBSET.batch):
        for head in range(SUBSET.heads):
            for slot, row in enumerate(positions[image].tolist()):
                expected = torch.zeros(SUBSET.width, dtype=torch.float64)
                if row >= 0:
                    scores = k[image, :, head] @ q[image, slot, head] / SUBSET.width**0.5
                    weights = (scores + bias[head, row]).exp()
                    expected = weights / weights.sum() @ v[image, :, head]
                torch.testing.assert_close(out[image, slot, head], expected)


@pytest.mark.parametrize("grid", [(14, 14), (5, 7), (1, 3)])
def test_the_index_is_the_models(grid: tuple[int, int]) -> None:
    assert torch.equal(definition.relative_index(grid), relative_index(grid))
    assert definition.relative_index(grid).max() == definition.table_rows(grid) - 1


def test_every_shape_that_matters_is_a_case() -> None:
    queries = {case.queries for case in CASES}
    assert {197, 50, 65, 577, 1601, 36, 1, 75} <= queries
    assert any(case.batch == 1 for case in CASES) and any(case.subset for case in CASES)
    assert {"attention", "packed", "table", "packed table", "expand"} == {c.kind for c in CASES}
    call = make_call(CASES[1], "bfloat16", 0, CPU)
    assert call.positions is not None and (call.positions < 0).any()
    assert len({case.name for case in CASES}) == len(CASES)


def test_kernels_pass_under_the_interpreter() -> None:
    """The real operations, on the smallest cases of each kind."""
    for name in ("5 x 7 grid", "expand 5 x 7", "65 tokens"):
        case = next(case for case in CASES if case.name == name).shrunk()
        assert failed(case, cases.ours) == set(), name


def test_integration_checks_can_fail() -> None:
    call = make_call(SMALL, "float32", 0, CPU)
    state = iter(range(1000))

    def forgetful(call: Call) -> Tensor:
        return exact(call) * (1 + 0.01 * next(state))

    assert integration.under_checkpoint(call, exact) == ""
    assert "differ" in integration.under_checkpoint(call, forgetful)
    assert integration.under_compile(call, "aot_eager", exact) == ""
    assert "not bfloat16" in integration.under_autocast(call, exact)

    def breaking(call: Call) -> Tensor:
        if call.leaves["q"].sum().item() > 0:
            return exact(call)
        return exact(call) + 0

    with pytest.raises(Exception, match=r"(?i)graph|item|dynamic"):
        integration.under_compile(call, "aot_eager", breaking)
