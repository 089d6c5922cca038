"""Resuming: bit-exact on the same ranks, the same samples on others, after a kill or a signal."""

import os
import signal
import time

import pytest

FLAGS = ["--steps=14", "--checkpoint-every=2", "--model.drop-path=0.2", "--model.layer-scale=0.1"]
"""Two steps a pass over the 70 images, so every resume goes through epoch boundaries."""


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def latest(run):
    pointer = run.dir / "checkpoints" / "latest"
    return int(pointer.read_text().strip().removeprefix("step-")) if pointer.exists() else 0


def rank_pids(run, ranks):
    """Process ids of the ranks, from the command lines under /proc."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
                with open(f"/proc/{entry}/environ", "rb") as file:
                    environment = dict(
                        p.split(b"=", 1) for p in file.read().split(b"\0") if b"=" in p
                    )
            except OSError:
                continue
            here = f"--run-dir={run.dir}".encode() in words
            if here and b"LOCAL_RANK" in environment and b"torch.distributed.run" not in words:
                found[int(environment[b"LOCAL_RANK"])] = int(entry)
    assert len(found) == ranks, found
    return found


def test_resume_after_kill_9_is_bit_exact(run, other_run):
    other_run.finish(*FLAGS)
    process = run.start(*FLAGS)
    wait_for(lambda: latest(run) >= 4, process)
    os.kill(rank_pids(run, 1)[0], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    resumed_at = latest(run)
    assert 4 <= resumed_at < 14, "killed too late to show anything"
    done = run.finish(*FLAGS)
    assert f"resuming at step {resumed_at}" in done.stdout
    assert list(run.metrics) == list(range(1, 15))
    for name in ("loss_nats", "accuracy", "grad_norm", "chance_loss_nats", "lr"):
        mine = [record[name] for record in run.metrics.values()]
        assert mine == [record[name] for record in other_run.metrics.values()], name
    assert (run.dir / "model.safetensors").read_bytes() == (
        other_run.dir / "model.safetensors"
    ).read_bytes()


def test_two_ranks_resume_bit_exactly_and_one_rank_goes_on_with_the_same_samples(run, other_run):
    other_run.finish(*FLAGS, ranks=2)
    run.finish(*FLAGS, "--stop-after=5", ranks=2)
    run.finish(*FLAGS, "--stop-after=9", ranks=2)
    assert run.losses == other_run.losses[:9]
    run.finish(*FLAGS, "--global-batch=32", ranks=1)  # other ranks: only rounding may differ
    assert run.losses == pytest.approx(other_run.losses, rel=1e-5)
    assert len(run.losses) == 14


@pytest.mark.parametrize(
    ("number", "target"), [(signal.SIGTERM, "torchrun"), (signal.SIGUSR1, "rank 1")]
)
def test_a_signal_saves_the_same_step_on_every_rank(run, number, target):
    flags = ["--steps=5000"]
    process = run.start(*flags, ranks=2)
    wait_for(lambda: (run.dir / "metrics.jsonl").exists() and len(run.metrics) >= 3, process)
    pids = rank_pids(run, 2)
    os.kill(process.pid if target == "torchrun" else pids[1], number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors  # torchrun's own code, whatever the ranks' was
    assert run.exit["code"] == 75
    assert run.exit["step"] == latest(run) == max(run.metrics)
    resumed = run.finish(*flags, f"--stop-after={latest(run) + 1}", ranks=2)
    assert f"resuming at step {run.exit['step'] - 1}" in resumed.stdout


def test_a_dead_rank_is_restarted_from_the_last_checkpoint(run, other_run):
    other_run.finish(*FLAGS, ranks=2)
    process = run.start(*FLAGS, ranks=2, torchrun=("--max-restarts=1",))
    wait_for(lambda: latest(run) >= 4, process)
    os.kill(rank_pids(run, 2)[1], signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resuming at step" in output
    assert run.losses == other_run.losses
