"""A whole run: what it leaves behind, and what it refuses."""

import fcntl
import json
import os

import pytest
import torch
from safetensors import safe_open

from fastbeit.tokenizer import load_tokenizer
from fastbeit.tokenizer.files import DEMO_PATH, save_tokenizer


def test_a_run_leaves_weights_metrics_summary_and_report(run):
    done = run.finish("--steps=6", "--model.position=relative", "--model.drop-path=0.1", ranks=None)
    assert "loader" in done.stdout and "step=6/6" in done.stdout
    assert list(run.metrics) == [1, 2, 3, 4, 5, 6]
    record = run.metrics[6]
    assert record["images_seen"] == 6 * 32 and record["epoch"] == 3.0  # 70 // 32 = 2 steps a pass
    assert record["bad_samples"] == 0 and record["skipped_steps"] == 0
    assert run.losses[-1] < run.losses[0]
    with safe_open(run.dir / "model.safetensors", "pt") as weights:
        assert "blocks.1.attn.q_bias" in weights.keys()
    summary = json.loads((run.dir / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["loss_nats"] == run.losses[-1]
    assert run.exit["code"] == 0 and run.exit["reason"] == "finished"
    assert (run.dir / "report.html").stat().st_size > 10_000
    assert json.loads((run.dir / "config.json").read_text())["run"]["steps"] == 6

    again = run.finish(
        "--steps=6", "--model.position=relative", "--model.drop-path=0.1", ranks=None
    )
    assert "resuming at step 6" in again.stdout
    assert list(run.metrics) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("shard", ["none", "zero3", "hybrid"])
def test_every_sharding_trains_alike(run, other_run, shard):
    # Four blocks are two units: what one leaves to the other must outlive its parameters.
    flags = ["--steps=5", "--model.position=relative", "--model.layer-scale=0.1"]
    flags += ["--model.depth=4"]
    run.finish(*flags, ranks=2)
    other_run.finish(*flags, f"--shard={shard}", ranks=2)
    assert other_run.losses == pytest.approx(run.losses, rel=1e-5)


def test_a_changed_configuration_is_refused_with_the_difference(run):
    run.finish("--steps=4", "--stop-after=2", ranks=None)
    assert run.exit == {**run.exit, "code": 0, "step": 2, "reason": "--stop-after was reached"}
    refused = run.finish("--steps=4", "--lr=0.5", ranks=None, code=2)
    assert "optimizer.lr: 0.001 -> 0.5" in refused.stderr
    assert "--allow-config-change" in refused.stderr
    run.finish("--steps=4", "--lr=0.5", "--allow-config-change", ranks=None)
    assert list(run.metrics) == [1, 2, 3, 4]


def test_other_data_than_the_checkpoints_are_refused(run):
    run.finish("--steps=4", "--stop-after=1", ranks=None)
    run.data = "demo"
    refused = run.finish("--steps=4", "--allow-config-change", ranks=None, code=2)
    assert "other data" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=/nonexistent/folder"], "/nonexistent/folder"),
        (["--model.vocab-size=100"], "--model.vocab-size 256"),
        (["--global-batch=128"], "70 images do not fill one global batch of 128"),
        (["--device=cuda"], "sees no CUDA GPU"),
        (["--optimizer=apex"], "--optimizer adamw"),
    ],
)
def test_wrong_input_ends_with_exit_2_and_a_sentence(run, flags, message):
    refused = run.finish(*flags, ranks=None, code=2)
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_empty_folder_ends_with_exit_2(run, tmp_path):
    (tmp_path / "empty").mkdir()
    run.data = tmp_path / "empty"
    refused = run.finish(ranks=None, code=2)
    assert "empty" in refused.stderr and "Traceback" not in refused.stderr


def test_too_many_bad_images_stop_the_run_and_are_listed(run, tmp_path, images):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in sorted(images.iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    for number in range(20):
        (folder / f"{number:03d}.png").write_bytes(b"not an image")
    run.data = folder
    stopped = run.finish("--steps=4", ranks=None, code=4)
    assert "000.png" in stopped.stderr or "0" in stopped.stderr
    assert run.exit["code"] == 4
    listed = (run.dir / "bad_samples.jsonl").read_text().splitlines()
    assert listed and all(".png" in line for line in listed)


def test_a_diverging_run_stops_and_names_the_samples(run):
    stopped = run.finish("--steps=40", "--lr=1e30", "--nonfinite-limit=3", ranks=2, code=1)
    assert run.exit["code"] == 3
    assert "Lower --lr" in stopped.stderr
    for rank in (0, 1):
        steps = json.loads((run.dir / f"nonfinite-rank-{rank}.json").read_text())
        assert len(steps) >= 3 and len(steps[-1]["samples"]) == 16
        assert steps[-1]["samples"][0]["name"].endswith(".png")


def test_a_run_folder_in_use_is_refused(run):
    run.dir.mkdir()
    with open(run.dir / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = run.finish("--steps=2", ranks=2, code=1)
    assert "in use by another run" in refused.stderr
    assert not (run.dir / "config.json").exists() and not (run.dir / "exit.json").exists()


def test_another_tokenizer_of_the_same_name_is_refused(run, tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    path.write_bytes(DEMO_PATH.read_bytes())
    flags = ["--steps=4", f"--tokenizer={path}"]
    run.finish(*flags, "--stop-after=1", ranks=None)
    other = load_tokenizer("demo")
    with torch.no_grad():
        other.encoder.head.b[0] += 1.0
    save_tokenizer(path, other.encoder, other.decoder, origin={"made": "by a test"})
    refused = run.finish(*flags, ranks=None, code=2)
    assert "another tokenizer of that name" in refused.stderr
    assert run.exit["code"] == 2


def test_an_error_on_one_rank_alone_is_said_and_recorded(run, tmp_path, images):
    """Rank 1's cache of shard indexes, or its mount, may be broken where rank 0's is not."""
    hidden = tmp_path / "sitecustomize.py"
    hidden.write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import fastbeit.data.source as source\n"
        "    def refuse(*args, **options):\n"
        "        raise ValueError('nothing is mounted here')\n"
        "    source.open_source = refuse\n"
        "    import fastbeit.data\n"
        "    fastbeit.data.open_source = refuse\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    run.extra_environment = {"PYTHONPATH": path}
    stopped = run.finish("--steps=2", ranks=2, code=1)
    assert "error on rank 1: nothing is mounted here" in stopped.stderr
    assert run.exit["code"] == 2 and "nothing is mounted" in run.exit["reason"]


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--global-batch=128",), 2)])
def test_a_run_leaves_without_taking_the_interpreter_down(run, tmp_path, flags, code):
    # gloo's threads may hold tensors beyond the last step: freeing them in a falling interpreter
    # aborts the process. Whatever happens only there must not be reached.
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\natexit.register(os.abort)\n")
    run.extra_environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    }
    done = run.finish("--steps=2", *flags, ranks=None, code=code)
    assert run.exit["code"] == code
    assert ("do not fill" in done.stderr) if code else ("report.html" in done.stdout)
