"""Peers: who runs is right before being timed, who does not becomes a row with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import forms, peers
from benchmarks.gpu.contest import run_problem
from benchmarks.gpu.tryout import NO_BIAS, NO_BIAS_GRADIENT, SAME
from benchmarks.peers import PEERS, Peer, peers_for
from benchmarks.problems import (
    BASE,
    BASE_LAST,
    END_TO_END,
    EXPAND,
    Inputs,
    Problem,
    input_sets,
    make_inputs,
)
from benchmarks.roofline import Ceiling
from benchmarks.timing import Limits, WallTimer

CPU = torch.device("cpu")


def contest(problem: Problem, chosen: list[Peer], **more: Any) -> tuple[list[dict], list[str]]:
    rows: list[dict] = []
    steps: list[str] = []
    run_problem(
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


EAGER = Peer("eager", forms.from_core(forms.eager_core), operations=peers.ATTEND)


def of_core(name: str, core: forms.Core) -> Peer:
    return Peer(name, forms.from_core(core))


def test_rows_of_those_who_run() -> None:
    blind = Peer("blind", forms.from_core(forms.eager_core, bias=False), bias=False)
    mine = Peer("mine", forms.ours("reference"), ours=True)
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
    assert row["n"] == 2 and row["p10_ms"] <= row["ms"] <= row["p90_ms"]
    assert timed["blind", "forward"]["work"] == NO_BIAS and row["work"] == SAME
    assert steps[:3] == ["mine", "eager", "blind"]


@pytest.mark.parametrize("problem", [BASE, BASE_LAST, END_TO_END, EXPAND], ids=lambda p: p.name)
def test_all_peers_of_a_problem_run_or_say_why(problem: Problem) -> None:
    quick = [peer for peer in peers_for(problem) if not peer.slow and not peer.ours]
    rows, _ = contest(problem, quick)
    ok = {row["contestant"] for row in rows if row.get("status") == "ok"}
    absent = {row["contestant"]: row for row in rows if row.get("status") == "unavailable"}
    assert ok | set(absent) == {peer.name for peer in quick}
    assert not ok & set(absent) and ok
    assert all(row["reason"] for row in absent.values())
    if problem is BASE and "xformers" in absent:
        assert "xformers" in absent["xformers"]["reason"]


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
    assert timed["backward"]["work"] == NO_BIAS_GRADIENT


def test_reasons_hold_the_warnings_that_explain_them() -> None:
    def explains(problem: Problem) -> forms.Form:
        def form(inputs: Inputs) -> Tensor:
            import warnings

            warnings.warn(
                "rows must be a multiple of 8 (Triggered internally at x.cpp)", stacklevel=1
            )
            raise RuntimeError("no available kernel")

        return form

    rows, _ = contest(BASE, [Peer("explains", explains)])
    assert rows[0]["reason"] == ("RuntimeError: no available kernel | rows must be a multiple of 8")


def test_an_excluded_peer_is_not_even_built() -> None:
    def bomb(problem: Problem) -> forms.Form:
        raise AssertionError("built")

    rows, steps = contest(BASE, [Peer("bomb", bomb)], excluded={"bomb": "ended by SIGSEGV"})
    assert rows[0]["status"] == "failed" and rows[0]["reason"] == "ended by SIGSEGV"
    assert "bomb" not in steps


def test_input_sets_outgrow_the_cache_and_hold_no_zeros() -> None:
    problem = replace(BASE, batch=1)
    one = make_inputs(problem, 0, CPU).bytes()
    sets = input_sets(problem, CPU, cache_bytes=2 * one)
    assert len(sets) == 6 and sum(inputs.bytes() for inputs in sets) >= 6 * one
    assert not torch.equal(sets[0].leaves["qkv"], sets[1].leaves["qkv"])
    for tensor in (*sets[0].leaves.values(), sets[0].dout):
        assert tensor.count_nonzero() >= 0.99 * tensor.numel()
    assert sets[0].leaves["bias"].stride() == (197 * 200, 200, 1)
    rows = make_inputs(replace(BASE_LAST, batch=2), 0, CPU).positions
    assert rows is not None and rows.shape == (2, 75)
    assert (rows[:, 1:] > rows[:, :-1]).all() and rows.min() >= 1 and rows.max() <= 196


def test_every_peer_of_the_list_is_there() -> None:
    names = " ".join(peer.name for peer in PEERS)
    for word in (
        "math",
        "efficient",
        "cuDNN",
        "flash",
        "FlexAttention",
        "xformers",
        "Transformer Engine",
        "torch.compile",
        "eager",
    ):
        assert word in names
    assert sum(peer.ours for peer in PEERS) == 1
