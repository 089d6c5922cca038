"""Statistics of timings, interleaving; counts of FLOPs and bytes against hand-computed values."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from benchmarks import roofline
from benchmarks.operations import OPERATIONS, problem_by_name
from benchmarks.operations.attention.cases import BASE, BASE_LAST, END_TO_END, EXPAND
from benchmarks.timing import CudaTimer, Limits, Sample, WallTimer, interleave, quantile, summarise


def test_quantiles_interpolate_between_order_statistics() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert quantile(values, 0.5) == 2.5
    assert quantile(values, 0.0) == 1.0 and quantile(values, 1.0) == 4.0
    assert quantile(values, 0.1) == pytest.approx(1.3)
    assert quantile([7.0], 0.9) == 7.0


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.5)])
def test_quantiles_of_nothing_or_beyond_are_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError):
        quantile(values, share)


def test_one_slow_sample_moves_no_median() -> None:
    samples = [Sample(1.0 + 0.01 * i, 0.5) for i in range(10)] + [Sample(100.0, 0.5, True)]
    stats = summarise(samples, calls=3)
    assert stats.ms == pytest.approx(1.05)
    assert stats.p10_ms == pytest.approx(1.01) and stats.p90_ms == pytest.approx(1.09)
    assert (stats.samples, stats.calls, stats.host_ms) == (11, 3, 0.5)
    assert not stats.host_bound
    assert summarise([Sample(1.0, 0.5, True)] * 2, 1).host_bound


def test_wall_timer_divides_by_the_calls() -> None:
    clock = itertools.count(0.0, 0.006)
    sample = WallTimer(lambda: next(clock)).sample([lambda: None] * 3)
    assert sample.device_ms == pytest.approx(2.0)


class Recorder:
    """A timer that notes who was measured; each call gives the contestant's name."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def sample(self, calls) -> Sample:
        self.seen.append(calls[0]())
        return Sample(1.0, 1.0)


def test_contestants_are_interleaved_in_changing_order() -> None:
    timer = Recorder()
    contestants = {name: [lambda name=name: name] for name in "abcd"}
    limits = Limits(seconds=0.0, least_rounds=8, most_rounds=8, warm_up_rounds=2)
    stats = interleave(contestants, timer, limits, seed=3)
    rounds = [timer.seen[i : i + 4] for i in range(0, len(timer.seen), 4)]
    assert len(rounds) == 2 + 8
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds[2:]}) > 3
    assert all(stat.samples == 8 for stat in stats.values())


def test_measuring_ends_with_its_time_but_not_before_the_least() -> None:
    clock = itertools.count(0.0, 1.0)
    limits = Limits(seconds=5.0, least_rounds=2, most_rounds=1000, warm_up_rounds=0)
    stats = interleave({"a": [lambda: "a"]}, Recorder(), limits, clock=lambda: next(clock))
    assert 2 <= stats["a"].samples < 10


class Device:
    """Stands in for torch.cuda: spins are over after their milliseconds, a call is queued in 1 ms
    and takes 0.25 ms of the device."""

    def __init__(self) -> None:
        self.host_ms = 0.0
        self.free_ms = 0.0

    def queue(self, ms: float) -> float:
        self.free_ms = max(self.free_ms, self.host_ms) + ms
        return self.free_ms

    def synchronize(self) -> None:
        self.host_ms = max(self.host_ms, self.free_ms)

    def call(self) -> None:
        self.host_ms += 1.0
        self.queue(0.25)


def stand_in(device: Device, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Puts it in torch.cuda's place; returns the milliseconds of each spin."""

    class Event:
        at_ms = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = device.queue(0.0)

        def query(self) -> bool:
            return self.at_ms <= device.host_ms

        def synchronize(self) -> None:
            device.synchronize()

        def elapsed_time(self, end: Event) -> float:
            return end.at_ms - self.at_ms

    spins: list[float] = []

    def sleep(cycles: int) -> None:
        spins.append(cycles / CudaTimer.CYCLES_PER_MS)
        device.queue(spins[-1])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: device.host_ms / 1e3)
    return spins


def test_cuda_timer_lengthens_its_spin_until_the_host_is_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device()
    spins = stand_in(device, monkeypatch)
    timer = CudaTimer()
    sample = timer.sample([device.call] * 4)
    # Behind a spin of 1 ms the device waits for the host; then 1.5 times the queueing's 4 ms.
    assert spins == [1.0, 6.0]
    assert sample == Sample(pytest.approx(0.25), pytest.approx(1.0), False)
    # What was learnt is kept; a queue that no spin can cover is marked.
    assert not timer.sample([device.call] * 4).host_bound and spins[2:] == [6.0]
    bound = timer.sample([device.call] * 200)
    assert bound.host_bound and spins[-1] == CudaTimer.LONGEST_SPIN_MS


def test_calls_that_wait_for_the_device_lengthen_nobodys_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A peer that reads a result on the host: no spin gets ahead of it, and it is marked."""
    device = Device()
    spins = stand_in(device, monkeypatch)

    def waits() -> None:
        device.call()
        device.synchronize()

    timer = CudaTimer()
    assert not timer.sample([device.call] * 4).host_bound and spins[-1] == 6.0
    assert timer.sample([waits] * 4).host_bound
    del spins[:]
    assert not timer.sample([device.call] * 4).host_bound and spins == [6.0]


# BEiT-B, 128 images, 12 heads, 197 tokens, 64 wide, bf16: one of q, k, v or the output is
# 128·12·197·64·2 = 38,731,776 bytes; log-sum-exp 128·12·197·4 = 1,210,368; the bias has
# 12·197·197 = 465,708 elements; a pair takes 128 FLOPs a product, 128·12·197² = 59,610,624 pairs.
TENSOR, LSE, BIAS, PAIRS = 38_731_776, 1_210_368, 465_708, 59_610_624


def test_attention_counts_of_beit_base() -> None:
    forward, backward = BASE.work("forward"), BASE.work("backward")
    assert forward.flops == 2 * 128 * PAIRS == 15_260_319_744
    assert forward.bytes == 4 * TENSOR + 2 * BIAS + LSE == 157_068_888
    assert backward.flops == 5 * 128 * PAIRS
    assert backward.bytes == 7 * TENSOR + 6 * BIAS + LSE == 275_127_048


def test_attention_counts_of_a_subset() -> None:
    queries = 128 * 12 * 75 * 64 * 2
    forward = BASE_LAST.work("forward")
    assert forward.flops == 2 * 128 * 128 * 12 * 75 * 197
    assert forward.bytes == 2 * queries + 2 * TENSOR + 2 * BIAS + 128 * 12 * 75 * 4


def test_expansion_counts() -> None:
    # 732 rows of 12 heads; the index is int64.
    assert EXPAND.work("forward").bytes == 4 * BIAS + 8 * 197**2 + 4 * 732 * 12
    assert EXPAND.work("backward").bytes == 4 * BIAS + 4 * 732 * 12


def test_from_the_table_the_bias_is_never_moved() -> None:
    table = 4 * 732 * 12
    assert END_TO_END.work("forward").bytes == 4 * TENSOR + LSE + table + 8 * 197**2
    assert END_TO_END.work("backward").bytes == 7 * TENSOR + LSE + table


def test_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    ceiling = roofline.Ceiling(tflops=1.0, tb_per_s=2.0, source="")
    assert ceiling.floor_ms(roofline.Work(3 * 10**9, 10)) == pytest.approx(3.0)
    assert ceiling.floor_ms(roofline.Work(10, 8 * 10**9)) == pytest.approx(4.0)
    # The forward of BEiT-B is bound by memory on an H100: 157 MB at 3 TB/s.
    assert roofline.Ceiling(798, 3.0, "").floor_ms(BASE.work("forward")) == pytest.approx(
        0.0523563, rel=1e-5
    )


def test_data_sheets_go_by_the_longest_name() -> None:
    pcie, sxm = (roofline.data_sheet_ceiling(f"NVIDIA H100 {kind}") for kind in ("PCIe", "80GB"))
    assert pcie is not None and sxm is not None and pcie.tb_per_s < sxm.tb_per_s
    assert roofline.data_sheet_ceiling("Voodoo 2") is None


# 128·197·768 bf16 elements; a row's mean and 1/σ are two fp32.
STREAM, ROWS = 128 * 197 * 768 * 2, 128 * 197


def work(name: str, direction: Any) -> tuple[int, int]:
    found = problem_by_name(name)[1].work(direction)
    return found.flops, found.bytes


def test_layer_norm_counts() -> None:
    # x, branch, y, normed; γ, weight, bias.
    name, alone = "BEiT-B, residual + LayerNorm", "BEiT-B, LayerNorm alone"
    assert work(name, "forward") == (0, 4 * STREAM + 3 * 768 * 2 + 8 * ROWS)
    # dy, dnormed, y, branch; dx, dbranch.
    assert work(name, "backward") == (0, 6 * STREAM + 3 * 768 * 2 + 8 * ROWS)
    # x, normed; dnormed, x, dx.
    assert work(alone, "forward") == (0, 2 * STREAM + 2 * 768 * 2 + 8 * ROWS)
    assert work(alone, "backward") == (0, 3 * STREAM + 2 * 768 * 2 + 8 * ROWS)
    # x, branch, y; dy, branch, dbranch: dx is dy.
    assert work("BEiT-B, residual alone", "forward") == (0, 3 * STREAM + 768 * 2)
    assert work("BEiT-B, residual alone", "backward") == (0, 3 * STREAM + 768 * 2)


def test_masked_head_counts() -> None:
    # 9,600 rows of 768 against 8,192 classes: 121 GFLOP a product, 0.454 ms of them at 798 TFLOP/s.
    product, weights, rows = 2 * 9600 * 768 * 8192, 769 * 8192 * 2, 9600 * 768 * 2
    forward = rows + weights + 2 * 8 * 9600 + 4
    name = "BEiT-B, masked head's loss"
    assert work(name, "no gradient") == (product, forward)
    assert work(name, "both") == (3 * product, forward + rows + 2 * weights + STREAM)
    selected = work(f"{name}, rows selected", "both")
    assert selected == (3 * product, forward - 8 * 9600 + 2 * rows + 2 * weights)
    problem = problem_by_name(name)[1]
    assert list(problem.kernel_bytes.values()) == [2 * 9600 * 8192 * 2]


def test_argmax_and_embedding_counts() -> None:
    flops = 2 * 9600 * 2048 * 8192
    moved = (9600 * 2048 + 8192 * 2049) * 2 + 8 * 9600
    assert work("tokenizer head, 9,600 rows", "forward") == (flops, moved)
    # 121 of 196 patches of 768 pixels; 197 tokens; weight, bias, CLS and mask token; int32 slots.
    flops = 2 * 128 * 121 * 768 * 768
    moved = 128 * 121 * 768 * 2 + STREAM + (768 + 3) * 768 * 2 + 4 * 128 * 75
    for direction in ("forward", "backward"):
        assert work("BEiT-B, patch embedding", direction) == (flops, moved)


def test_problems_and_cases_have_names_of_their_own() -> None:
    problems = [problem.name for operation in OPERATIONS for problem in operation.problems]
    cases = [case.name for operation in OPERATIONS for case in operation.cases]
    assert len(set(problems)) == len(problems) and len(set(cases)) == len(cases)
    assert problem_by_name(BASE.name) == (OPERATIONS[0], BASE)
    with pytest.raises(ValueError, match="BEiT-L"):
        problem_by_name("BEiT-XXL")
