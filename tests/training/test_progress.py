"""What is shown and written at a log step, on a terminal and without one, on rank 0 and others."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fastbeit.training.metrics import read_metrics
from fastbeit.training.progress import RunLog, format_duration, plain_line

METRICS = {
    "epoch": 1.5,
    "loss_nats": 3.21987,
    "accuracy": 0.4321,
    "chance_loss_nats": 3.5,
    "chance_accuracy": 0.38,
    "lr": 1.5e-3,
    "grad_norm": 0.9,
    "images_per_s": 1234.5,
    "step_ms": 200.0,
    "data_wait_share": 0.31,
    "codebook_used": 200,
    "codebook_perplexity": 90.25,
    "mfu": 0.41,
    "skipped_steps": 0,
    "bad_samples": 2,
    "images_seen": 6400,
    "time_s": 12.5,
}


def _console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=88, color_system=None)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_line_has_known_keys_in_order_then_others():
    shuffled = dict(reversed(METRICS.items())) | {"zeta": 1, "alpha": None}
    line = plain_line(120, 500, shuffled, eta_s=76.0)
    assert line == (
        "step=120/500 epoch=1.50 loss_nats=3.2199 chance_loss_nats=3.5000 accuracy=0.4321 "
        "chance_accuracy=0.3800 lr=1.500e-03 grad_norm=0.900 images_per_s=1234.5 step_ms=200.0 "
        "data_wait_share=0.310 mfu=0.4100 codebook_used=200 codebook_perplexity=90.2 "
        "skipped_steps=0 bad_samples=2 images_seen=6400 time_s=12.5 alpha=nan zeta=1 eta_s=76"
    )


def test_without_a_terminal_one_line_a_log_call(tmp_path: Path, capsys):
    with RunLog(tmp_path / "run", total_steps=500, terminal=False) as log:
        log.note("loader: reference (no GPU)")
        log.tick(1)
        log.log(120, **METRICS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loader: reference (no GPU)"
    assert lines[1].startswith("step=120/500 epoch=1.50 loss_nats=3.2199")
    assert lines[1].endswith("eta_s=76")  # 380 steps of 200 ms
    assert len(lines) == 2
    assert read_metrics(tmp_path / "run/metrics.jsonl") == [{"step": 120, **METRICS}]


def test_plain_lines_are_chosen_where_output_is_no_terminal(tmp_path: Path, capsys):
    with RunLog(tmp_path, total_steps=2) as log:
        log.log(1, loss_nats=float("nan"))
    assert capsys.readouterr().out == "step=1/2 loss_nats=nan\n"
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss_nats": None}]


def test_the_panel_shows_everything_a_person_asks_for(tmp_path: Path):
    console = _console()
    with RunLog(
        tmp_path, total_steps=500, terminal=True, console=console, mfu_peak="989 TFLOP/s [dense]"
    ) as log:
        log.log(120, **METRICS)
        log.note("checkpoint [bold]saved")
    shown = _text(console)
    for part in (
        "120 / 500",
        "24.0%",
        "ETA 1m 16s",
        "loss 3.2199 nats",
        "chance 3.5000",
        "accuracy 43.2 %",
        "chance 38.0 %",
        "1,234 images/s",
        "200.0 ms/step",
        "waiting for data 31.0 % (bottleneck)",
        "MFU 41.0 % of 989 TFLOP/s [dense]",
        "codes 200",
        "bad samples 2",
        "skipped steps 0",
        "lr 1.50e-03",
        "checkpoint [bold]saved",
    ):
        assert part in shown, part


def test_tick_moves_the_bar_between_log_lines_but_not_every_step(tmp_path: Path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("fastbeit.training.progress.time.monotonic", lambda: clock[0])
    console = _console()
    with RunLog(tmp_path, total_steps=500, terminal=True, console=console) as log:
        log.tick(1)
        log.tick(2)  # within a quarter of a second: not drawn
        assert "1 / 500" in _text(console) and "2 / 500" not in _text(console)
        clock[0] += 0.3
        log.tick(3)
        assert "3 / 500" in _text(console)


def test_other_ranks_write_and_show_nothing(tmp_path: Path, capsys):
    with RunLog(tmp_path / "run", total_steps=5, terminal=True, rank=1, sinks=["nonsense"]) as log:
        log.note("hello")
        log.tick(1)
        log.log(1, **METRICS)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_steps_ascend_and_a_resume_truncates(tmp_path: Path):
    with RunLog(tmp_path, total_steps=40, terminal=False) as log:
        for step in (10, 20, 30):
            log.log(step, loss_nats=1.0)
        with pytest.raises(ValueError, match="got 30 after 30"):
            log.log(30, loss_nats=1.0)
    with RunLog(tmp_path, total_steps=40, start_step=20, terminal=False) as log:
        log.log(30, loss_nats=2.0)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss_nats"]) for r in records] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_an_unavailable_sink_leaves_the_old_metrics_alone(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="got 'mlflow'"):
        RunLog(tmp_path, total_steps=5, sinks=["mlflow"], terminal=False)
    assert path.read_text() == '{"step": 1}\n'


def test_custom_sinks_get_the_same_numbers_and_close_is_harmless_twice(tmp_path: Path):
    class Recorder:
        def __init__(self):
            self.calls, self.closed = [], 0

        def log(self, step, metrics):
            self.calls.append((step, dict(metrics)))

        def close(self):
            self.closed += 1

    recorder = Recorder()
    log = RunLog(tmp_path, total_steps=5, sinks=[recorder], terminal=False)
    log.log(1, loss_nats=1.0)
    log.close()
    log.close()
    assert recorder.calls == [(1, {"loss_nats": 1.0})]
    assert recorder.closed == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (725, "12m 05s"), (11220, "3h 07m"), (352800, "4d 02h")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
