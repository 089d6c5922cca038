"""Peers: who runs is right before being timed, who does not becomes a row with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.call import Call, Function, Outputs
from benchmarks.gpu.contest import run_problem
from benchmarks.operation import SAME, Operation, Peer, Problem
from benchmarks.operations import OPERATIONS, attention
from benchmarks.operations.attention import forms
from benchmarks.operations.attention.cases import BASE, BASE_LAST
from benchmarks.operations.attention.peers import BIASES, NO_BIAS
from benchmarks.peers import plainly
from benchmarks.roofline import Ceiling
from benchmarks.timing import Limits, WallTimer

CPU = torch.device("cpu")


def contest(
    problem: Problem, chosen: list[Peer], operation: Operation = attention.OPERATION, **more: Any
) -> tuple[list[dict], list[str]]:
    rows: list[dict] = []
    steps: list[str] = []
    run_problem(
        operation,
        problem.shrunk(),
        rows.append,
        steps.append,
        timer=WallTimer(),
        limits=Limits(0.0, 2, 2, 0),
        device=CPU,
        ceiling=Ceiling(1.0, 0.01, ""),
        cache_bytes=0,
        slow=False,
        peers=chosen,
        **more,
    )
    return rows, steps


EAGER = Peer("eager", forms.from_core(forms.eager_core))


def of_core(name: str, core: forms.Core) -> Peer:
    return Peer(name, forms.from_core(core))


def test_rows_of_those_who_run() -> None:
    form = forms.from_core(forms.eager_core, bias=False)
    blind = Peer("blind", form, less=NO_BIAS, without=BIASES)
    mine = Peer("mine", plainly(forms.ours("reference")), ours=True)
    rows, steps = contest(BASE, [mine, EAGER, blind])
    timed = {(row["contestant"], row["pass"]): row for row in rows if row.get("status") == "ok"}
    assert set(timed) == {
        (n, p) for n in ("mine", "eager", "blind") for p in ("forward", "backward")
    }
    work = BASE.shrunk().work("backward")
    row, rival = timed["mine", "backward"], timed["eager", "backward"]
    assert row["ratio_to_best_peer"] == pytest.approx(row["ms"] / rival["ms"])
    assert rival["ratio_to_best_peer"] == 1.0
    assert row["tflops"] == pytest.approx(work.flops / row["ms"] / 1e9)
    assert row["fraction_of_roofline"] == pytest.approx(row["roofline_ms"] / row["ms"])
    assert row["fraction_of_copy"] == pytest.approx(row["tb_per_s"] / 0.01)
    assert row["n"] == 2 and row["p10_ms"] <= row["ms"] <= row["p90_ms"]
    assert timed["blind", "forward"]["work"] == NO_BIAS and row["work"] == SAME
    assert steps[:3] == ["mine", "eager", "blind"]


PROBLEMS = [(op, problem) for op in OPERATIONS for problem in op.problems if problem.worth < 2]


@pytest.mark.parametrize(("operation", "problem"), PROBLEMS, ids=lambda one: one.name)
def test_all_peers_of_a_problem_run_or_say_why(operation: Operation, problem: Problem) -> None:
    quick = [p for p in operation.peers_for(problem.shape) if not p.slow and not p.ours]
    rows, _ = contest(problem, quick, operation)
    ok = {(row["contestant"], row["pass"]) for row in rows if row.get("status") == "ok"}
    absent = {row["contestant"]: row for row in rows if row.get("status") == "unavailable"}
    running = {name for name, _ in ok}
    assert running | set(absent) == {peer.name for peer in quick}
    assert not running & set(absent) and running
    assert {direction for _, direction in ok} == set(problem.passes)
    assert all(row["reason"] for row in absent.values())
    for word in ("xformers", "Liger", "quack", "apex", "Apple"):
        assert all("import" in row["reason"] for name, row in absent.items() if word in name)


def test_a_wrong_peer_is_not_timed() -> None:
    for core in (
        lambda q, k, v, bias: forms.eager_core(q, k, v, bias) * 1.01,
        lambda q, k, v, bias: forms.eager_core(q, k, v, bias) * float("nan"),
        # Right output, no gradient of the bias.
        lambda q, k, v, bias: forms.eager_core(q, k, v, bias.detach() + 0 * bias),
    ):
        rows, _ = contest(BASE, [of_core("wrong", core), EAGER])
        wrong = [row for row in rows if row["contestant"] == "wrong"]
        assert [row["status"] for row in wrong] == ["wrong"]
        assert "not timed" in wrong[0]["reason"]
        assert any(row["contestant"] == "eager" and row.get("status") == "ok" for row in rows)


def test_a_peer_that_refuses_the_gradient_of_a_bias_does_less_work() -> None:
    def proud(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        if bias.requires_grad:
            raise RuntimeError("attn_bias must not require a gradient")
        return forms.eager_core(q, k, v, bias)

    rows, _ = contest(BASE, [of_core("proud", proud), EAGER])
    timed = {row["pass"]: row for row in rows if row["contestant"] == "proud" and "pass" in row}
    assert timed["forward"]["work"] == SAME
    assert timed["backward"]["work"] == "no bias gradient"


def test_reasons_hold_the_warnings_that_explain_them() -> None:
    def explains(_shape: Any) -> Function:
        def form(call: Call) -> Outputs:
            import warnings

            warnings.warn(
                "rows must be a multiple of 8 (Triggered internally at x.cpp)", stacklevel=1
            )
            raise RuntimeError("no available kernel")

        return form

    rows, _ = contest(BASE, [Peer("explains", explains)])
    assert rows[0]["reason"] == ("RuntimeError: no available kernel | rows must be a multiple of 8")


def test_an_excluded_peer_is_not_even_built() -> None:
    def bomb(_shape: Any) -> Function:
        raise AssertionError("built")

    rows, steps = contest(BASE, [Peer("bomb", bomb)], excluded={"bomb": "ended by SIGSEGV"})
    assert rows[0]["status"] == "failed" and rows[0]["reason"] == "ended by SIGSEGV"
    assert "bomb" not in steps


def test_input_sets_outgrow_the_cache_and_hold_no_zeros() -> None:
    problem = replace(BASE, shape=replace(BASE.shape, batch=1))
    one = problem.make(0, CPU).bytes()
    sets = problem.input_sets(CPU, cache_bytes=2 * one)
    assert len(sets) == 6 and sum(inputs.bytes() for inputs in sets) >= 6 * one
    assert not torch.equal(sets[0].leaves["qkv"], sets[1].leaves["qkv"])
    assert sets[0].leaves["bias"].stride() == (197 * 200, 200, 1)
    rows = replace(BASE_LAST.shape, batch=2).make(torch.float32, 0, CPU).given["positions"]
    assert rows.shape == (2, 75)
    assert (rows[:, 1:] > rows[:, :-1]).all() and rows.min() >= 1 and rows.max() <= 196


@pytest.mark.parametrize(("operation", "problem"), PROBLEMS, ids=lambda one: one.name)
def test_inputs_are_random_and_no_slot_is_empty(operation: Operation, problem: Problem) -> None:
    call = problem.shrunk().make(0, CPU)
    for name, tensor in {**call.leaves, **call.given, **call.douts}.items():
        # DropPath drops images, and table offsets begin at zero.
        if tensor.is_floating_point() and name != "drop_scale":
            assert tensor.count_nonzero() >= 0.99 * tensor.numel(), name
    for name in ("positions", "targets"):
        assert name not in call.given or (call.given[name] >= 0).all()
    assert all(leaf.requires_grad for leaf in call.leaves.values())


PEERS = {
    "attention": "math efficient cuDNN flash FlexAttention xformers Engine torch.compile eager",
    "residual and LayerNorm": "eager torch.compile Liger quack apex",
    "masked head's loss": "eager torch.compile Liger CCE quack",
    "linear_argmax": "GEMM mm argmax torch.compile",
    "patch embedding": "eager conv2d torch.compile",
    "frozen convolutions": "cuDNN torch.compile",
    "bias and GELU": "eager torch.compile",
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)
def test_every_peer_of_the_list_is_there(operation: Operation) -> None:
    names = " ".join(peer.name for peer in operation.peers)
    assert all(word in names for word in PEERS[operation.name].split())
    assert sum(peer.ours for peer in operation.peers) == 1
    for problem in operation.problems:
        able = operation.peers_for(problem.shape)
        assert sum(peer.ours for peer in able) == 1
        assert any(not peer.ours and not peer.less for peer in able)


def test_a_library_without_what_is_needed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an older quack would: imported, and lacking."""
    import sys
    import types

    for name in ("quack", "quack.rmsnorm", "quack.linear_cross_entropy"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for number in (1, 2):
        operation = OPERATIONS[number]
        chosen = [peer for peer in operation.peers if "quack" in peer.name]
        rows, _ = contest(operation.problems[0], chosen, operation)
        assert len(rows) == len(chosen)
        assert all(row["reason"].startswith("this quack has no") for row in rows)
