"""What a benchmark is told: checked first, repeated where quick, memory and limits measured."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import ceilings, conftest, suite, test_pretrain, test_scaling
from benchmarks.suite_rows import AGAIN, REFERENCE, Row, key_of, over, ratio


def test_without_timing_the_code_is_tried_and_nothing_measured() -> None:
    calls: list[str] = []
    benchmark = SimpleNamespace(
        extra_info={}, disabled=True, pedantic=lambda call, **_: call(), stats=None
    )
    suite.measure(
        benchmark,
        lambda: calls.append("run"),
        suite="s",
        part="p",
        path="fast",
        check=lambda: calls.append("check"),
        batch=3,
    )
    assert calls == ["check", "run"]
    assert (
        benchmark.extra_info["sizes"] == {"batch": 3} and "peak_bytes" not in benchmark.extra_info
    )


def test_a_failed_check_is_not_timed() -> None:
    def wrong() -> None:
        raise AssertionError("off")

    benchmark = SimpleNamespace(extra_info={}, disabled=False)
    with pytest.raises(AssertionError, match="off"):
        suite.measure(benchmark, lambda: None, suite="s", part="p", path="fast", check=wrong)
    assert benchmark.extra_info["path"] == "fast"


@pytest.mark.parametrize(
    ("first_ms", "call_ms", "warmup", "calls", "made"),
    [
        (60, 1, 1, 20, 21),  # what the first sets up doesn't count
        (60, 30, 1, 1, 2),
        (300, 300, 1, 1, 1),  # too long to be called once more
        (1, 1, 0, 1, 0),  # without a warm-up nothing is known
        (0.001, 0.001, 3, 10_000, None),
    ],
)
def test_quick_calls_are_repeated(
    first_ms: float,
    call_ms: float,
    warmup: int,
    calls: int,
    made: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s, count = [0.0], [0]
    monkeypatch.setattr(suite.time, "perf_counter", lambda: now_s[0])

    def call() -> None:
        now_s[0] += (call_ms if count[0] else first_ms) / 1e3
        count[0] += 1

    assert suite._calls(suite._warm_up(call, warmup)) == calls
    assert made is None or count[0] == made


@pytest.mark.skipif(not suite.CLEAR_REFS.exists(), reason="only Linux tells the high-water mark")
@pytest.mark.skipif(suite.DEVICE != "cpu", reason="on a GPU it is torch's own count")
def test_peak_memory_is_what_was_added_and_not_what_came_before() -> None:
    before = torch.ones(2**24)
    del before
    began = suite.start_peak()
    inside = torch.ones(2**23)  # 32 MiB
    del inside
    peak = suite.end_peak(began)
    assert peak is not None and 2**25 <= peak + 2**20 and peak < 2**25 + 2**23


def test_ceilings_are_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "LEAST_S", 0.0)
    monkeypatch.setattr(ceilings, "COPIED_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(ceilings, "_measured", {})
    ceilings.product_tflops.cache_clear()
    ceilings.copy_tb_per_s.cache_clear()
    first = ceilings.ceiling("cpu", "float32")
    assert first.tflops > 0 and first.tb_per_s > 0 and "side 256" in first.source
    assert ceilings.ceiling("cpu", "float32") == first
    assert set(ceilings.measured()) == {"float32"}
    with pytest.raises(ValueError, match="int32"):
        ceilings.ceiling("cpu", "int32")
    ceilings.product_tflops.cache_clear()
    ceilings.copy_tb_per_s.cache_clear()


def not_disabled() -> Any:
    return SimpleNamespace(extra_info={}, disabled=False)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> suite.Session:
    monkeypatch.setattr(suite, "SESSION", suite.Session())
    return suite.SESSION


def test_when_time_is_up_a_row_says_so(
    session: suite.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    about: dict[str, Any] = {"suite": "s", "part": "p", "path": "fast", "dtype": "float32"}
    suite.name_row(not_disabled(), about, {})
    monkeypatch.setenv(suite.MINUTES_VARIABLE, "0.5")
    suite.begin_session(time.monotonic() - 29)
    suite.name_row(not_disabled(), about, {})
    suite.begin_session(time.monotonic() - 31)
    late = not_disabled()
    with pytest.raises(pytest.skip.Exception, match="out of time"):
        suite.measure(late, lambda: None, **about, batch=3)
    assert late.extra_info == {**about, "sizes": {"batch": 3}}
    late.disabled = True  # the code is tried however long it takes
    suite.name_row(late, about, {})


@pytest.mark.parametrize("minutes", ["soon", "0", "-1", "nan"])
def test_minutes_are_a_number(
    session: suite.Session, minutes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(suite.MINUTES_VARIABLE, minutes)
    with pytest.raises(ValueError, match=f"number of minutes above 0, got '{minutes}'"):
        suite.begin_session(0.0)
    assert session.deadline_s == math.inf


def test_what_does_not_fit_is_missing() -> None:
    run = conftest.pytest_runtest_call(item=Any)  # pyright: ignore[reportArgumentType]
    next(run)
    with pytest.raises(pytest.skip.Exception, match="memory is too small"):
        run.throw(torch.OutOfMemoryError("CUDA out of memory"))
    run = conftest.pytest_runtest_call(item=Any)  # pyright: ignore[reportArgumentType]
    next(run)
    with pytest.raises(RuntimeError, match="another"):
        run.throw(RuntimeError("another"))


def test_too_many_graphs_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo
    from torch._dynamo.exc import FailOnRecompileLimitHit

    monkeypatch.setattr(suite, "RECOMPILES", 2)

    @torch.compile(backend="eager", dynamic=False)
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    for _ in range(2):  # each begins anew
        with suite.begin_compiling():
            for size in (2, 3):
                double(torch.ones(size))
    with suite.begin_compiling(), pytest.raises(FailOnRecompileLimitHit):
        for size in (2, 3, 4):
            double(torch.ones(size))
    assert not torch._dynamo.config.fail_on_recompile_limit_hit
    torch._dynamo.reset()


def test_without_a_compiler_none_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "COMPILES", False)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    with suite.begin_compiling():
        assert "torch._dynamo" not in sys.modules


def test_on_a_gpu_samples_take_half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, step, quick in (("cpu", 2, 11), ("cuda", 20, 25)):
        monkeypatch.setattr(suite, "DEVICE", device)
        assert suite._rounds(2, 1, [9.0, 0.025]) == step
        assert suite._rounds(5, 20, [0.001]) == quick
        assert suite._rounds(2, 1, [9.0, 0.4]) == 2
        assert suite._rounds(1, 1, []) == 1


def test_a_capture_is_part_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(suite, "start_peak", lambda: told.append("watched"))
    monkeypatch.setattr(suite, "end_peak", lambda _: None)
    benchmark = not_disabled()
    benchmark.pedantic = lambda call, **_: call()
    benchmark.stats = SimpleNamespace(stats=SimpleNamespace(median=1.0))
    suite.measure(
        benchmark,
        lambda: told.append("run"),
        suite="s",
        part="p",
        path="kernels",
        check=lambda: told.append("checked"),
        check_watched=lambda: told.append("captured"),
        warmup=0,
    )
    assert told == ["checked", "watched", "captured", "run"]


def test_without_its_reference_nothing_is_compared_with_itself(tmp_path: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match="reference wasn't measured"):
        test_scaling.test_scaling(not_disabled(), {}, [], tmp_path, 2, "shared")
    with pytest.raises(pytest.skip.Exception, match="reference wasn't measured"):
        test_pretrain.test_demo(not_disabled(), Any, {}, tmp_path, "fast")  # pyright: ignore


def test_losses_are_held_tightly_before_rounding_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_scaling, "FIRST", 1e-3)
    monkeypatch.setattr(test_scaling, "LATER", 1e-2)
    test_scaling.assert_same_losses([9.005, 8.05], [9.0, 8.0])
    for found in ([9.05, 8.0], [9.0, 8.2], [9.0]):
        with pytest.raises(AssertionError):
            test_scaling.assert_same_losses(found, [9.0, 8.0])


def test_what_the_reference_drifted_by_is_in_the_error() -> None:
    def row(path: str, ms: float, **more: Any) -> Row:
        about = {"suite": "step", "part": "p", "path": path, "dtype": "float32"}
        times = {"ms": ms, "p10_ms": ms, "p90_ms": ms, "n": 5, "status": "ok"}
        return {**about, "sizes": {"batch": 2}, **times, **more}

    first, fast, again = row(REFERENCE, 100.0), row("fast", 90.0), row(AGAIN, 120.0)
    rows = {key_of(r): r for r in (first, fast)}
    assert over(fast, first, rows) == (0.9, 0.0)
    rows[key_of(again)] = again
    assert over(fast, first, rows) == (0.9, pytest.approx(math.log(1.2)))
    for other in (row(AGAIN, 120.0, status="failed"), row(AGAIN, 120.0, dtype="bfloat16")):
        rows = {key_of(r): r for r in (first, fast, other)}
        assert over(fast, first, rows) == (0.9, 0.0)


def test_what_ran_in_turn_is_compared_with_its_neighbours() -> None:
    """Times drift by half, ratios don't; the yardstick's dtype need not be the twin's."""

    def row(path: str, ms: float, ratio: float | None = None, dtype: str = "float32") -> Row:
        about = {"suite": "step", "part": "p", "path": path, "dtype": dtype, "sizes": {}}
        times = {"ms": ms, "p10_ms": 0.8 * ms, "p90_ms": 1.2 * ms, "n": 5, "status": "ok"}
        if ratio is not None:
            times["over_reference"] = {"value": ratio, "p10": ratio, "p90": ratio, "n": 5}
        return {**about, **times}

    found = [
        row(REFERENCE, 100.0),
        row("fast", 75.0, 0.5),
        row("theirs", 200.0, 1.25),
        row(REFERENCE, 70.0, 0.8, "bfloat16"),
        row("fast", 33.0, 0.2, "bfloat16"),
    ]
    rows = {key_of(r): r for r in found}
    reference, fast, theirs, _, low_fast = found
    assert over(fast, reference, rows) == (0.5, 0.0)
    assert over(fast, theirs, rows) == (pytest.approx(0.4), 0.0)
    assert ratio(key_of(low_fast), rows) == (pytest.approx(0.25), 0.0)  # its twin is in bfloat16
    assert over(low_fast, reference, rows) == (pytest.approx(0.2), 0.0)
    # One pair of samples: its error is what is usual in the suite, and nothing says what that is.
    alone = fast | {"over_reference": {"value": 0.5, "p10": 0.5, "p90": 0.5, "n": 1}}
    assert math.isinf(over(alone, reference, {key_of(r): r for r in (reference, alone)}).error)


def test_a_call_and_its_twin_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(suite, "end_peak", lambda _: told.append("peak"))
    benchmark = not_disabled()
    data = [2.0, 4.0, 6.0]
    benchmark.stats = SimpleNamespace(stats=SimpleNamespace(median=4.0, data=data))

    def pedantic(call: Any, rounds: int, teardown: Any) -> None:  # as pytest-benchmark's
        for _ in range(rounds):
            call()
            teardown()

    benchmark.pedantic = pedantic
    monkeypatch.setattr(suite, "_seconds", lambda call: call() or 2.0)
    about: dict[str, Any] = {"suite": "s", "part": "p", "path": "fast", "warmup": 0}

    def own() -> None:
        told.append("own")

    def twin() -> None:
        told.append("twin")

    suite.measure(benchmark, own, beside=twin, rounds=3, **about)
    assert told == ["own", "peak", "twin"] * 3
    assert benchmark.extra_info["over_reference"] == {
        "value": 2.0, "p10": pytest.approx(1.2), "p90": pytest.approx(2.8), "n": 3,
    }  # fmt: skip
    assert benchmark.extra_info["reference_ms"] == 2000.0
