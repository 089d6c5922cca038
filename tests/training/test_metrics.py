"""metrics.jsonl stays strict JSON with unique steps through kills and resumes."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbeit.training.metrics import JsonlSink, make_sink, read_metrics, to_scalar


def test_scalars_become_plain_json():
    assert to_scalar(torch.tensor(1.5)) == 1.5
    assert to_scalar(np.float32(0.25)) == 0.25
    assert to_scalar(np.int64(3)) == 3 and type(to_scalar(np.int64(3))) is int
    assert to_scalar(torch.tensor(float("nan"))) is None
    assert to_scalar(math.inf) is None
    assert to_scalar("bf16") == "bf16"
    with pytest.raises(ValueError, match="single numbers"):
        to_scalar(torch.zeros(2))
    with pytest.raises(ValueError, match="got list"):
        to_scalar([1])


def test_lines_are_flushed_one_by_one(tmp_path: Path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(1, {"loss_nats": 2.0})
    sink.log(2, {"loss_nats": None})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss_nats": 2.0},
        {"step": 2, "loss_nats": None},
    ]
    sink.close()


def test_resume_drops_later_lines_and_a_torn_one(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "run": "first"}) for step in (10, 20, 30, 40)]
    path.write_text("\n".join(lines) + '\n{"step": 50, "los')
    sink = JsonlSink(path, start_step=25)
    sink.log(30, {"run": "second"})
    sink.close()
    records = read_metrics(path)
    assert [(r["step"], r["run"]) for r in records] == [
        (10, "first"),
        (20, "first"),
        (30, "second"),
    ]
    assert list(tmp_path.iterdir()) == [path]  # no partial file left behind


def test_a_damaged_middle_line_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n<html>\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2.*<html>"):
        read_metrics(path)


def test_tensorboard_writes_events_of_finite_numbers(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="the optional extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = make_sink("tensorboard", tmp_path)
    sink.log(1, {"loss_nats": 3.0, "mfu": None})
    sink.log(2, {"loss_nats": 2.5, "note": "text"})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss_nats"]
    assert [(e.step, e.value) for e in events.Scalars("loss_nats")] == [(1, 3.0), (2, 2.5)]


@pytest.mark.parametrize(
    ("name", "module", "flag"),
    [("tensorboard", "tensorboard", "--tensorboard"), ("wandb", "wandb", "--wandb")],
)
def test_a_sink_that_is_not_installed_is_a_clear_error(monkeypatch, tmp_path, name, module, flag):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{flag} needs the package {module}.*fastbeit\[tracking"):
        make_sink(name, tmp_path)


def test_an_unknown_sink_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="got 'mlflow'"):
        make_sink("mlflow", tmp_path)


class _WandbStandIn:
    """The three calls that the sink makes, recorded."""

    def __init__(self):
        self.inits, self.logged, self.finished, self.id = [], [], 0, "abc123"

    def init(self, **arguments):
        self.inits.append(arguments)
        return self

    def log(self, metrics, *, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


def test_wandb_goes_on_under_the_same_id(monkeypatch, tmp_path: Path):
    wandb = _WandbStandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    first = make_sink("wandb", tmp_path, config={"width": 128})
    first.log(1, {"loss_nats": 2.0, "mfu": None})
    first.close()
    make_sink("wandb", tmp_path, start_step=1).close()
    make_sink("wandb", tmp_path).close()  # a fresh run in the same folder: a new id
    assert wandb.logged == [(1, {"loss_nats": 2.0})]
    assert wandb.inits[0]["config"] == {"width": 128}
    assert [call["id"] for call in wandb.inits] == [None, "abc123", None]
    assert wandb.finished == 3
