"""What a benchmark is told: checked first, repeated where quick, memory and limits measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import ceilings, suite


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
