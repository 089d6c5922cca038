"""The command that compares the model of many GPUs with two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastbeit.training import scale_check
from fastbeit.training.scale import Collective, Group, model_units, traffic
from fastbeit.training.scale_check import LARGE_BYTES, SMALL_BYTES, compare, measured_cost, report

LATENCY_S, BYTES_PER_S = 1e-3, 1e9
MODEL = scale_check.model_config(48)


def made_up() -> scale_check.Times:
    """Least times of a machine that the model describes exactly, behind slower rounds."""
    times = {"alone": 1.0, "alone update": 0.25, "beside": 1.5, "beside update": 0.5}
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        for size in (SMALL_BYTES, LARGE_BYTES):
            times[f"{kind} {size}"] = LATENCY_S + size / BYTES_PER_S
    for mode in scale_check.MODES:
        calls = list(traffic(model_units(MODEL, "fp32"), mode, 2, 2).collectives())
        sends = len(calls) * LATENCY_S + sum(call.size for call in calls) / BYTES_PER_S
        update = 0.5 if mode == "none" else 0.25  # AdamW on half of the numbers
        times[mode] = 1.0 + update + sends
    return {name: [2 * least, least, 1.5 * least] for name, least in times.items()}


def test_the_prediction_meets_a_machine_that_behaves_as_the_model_says() -> None:
    times = made_up()
    call = Collective("all_gather", 10_000_000, Group(2, 1))
    assert measured_cost(times)(call) == pytest.approx(LATENCY_S + 0.01)
    rows = compare(times, MODEL)
    assert [row["mode"] for row in rows] == ["none", "zero2", "zero3"]
    for row in rows:
        assert row["from beside"] == pytest.approx(row["measured"], rel=1e-9)
        assert row["from alone"] < row["from beside"]
    assert report(times, rows).count("(+0%)") + report(times, rows).count("(-0%)") == 3


@pytest.mark.slow
def test_two_processes_are_measured_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "record.json"
    arguments = ["--rounds", "2", "--width", "48", "--out", str(out)]
    assert scale_check.main(arguments) == 0
    record = json.loads(out.read_text())
    assert all(len(values) == 2 and min(values) > 0 for values in record["times_s"].values())
    for row in record["rows"]:
        assert row["measured"] == min(record["times_s"][row["mode"]])
        # What the predictions add to a step without communication is what the model says is sent.
        assert 0 < row["communication"] < row["from beside"]
    shown = capsys.readouterr().out
    assert "2 rounds; load" in shown
    for row in record["rows"]:
        assert f"\n{row['mode']:<24} {1e3 * row['measured']:>11.1f}" in shown
