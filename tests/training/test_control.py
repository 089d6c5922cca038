"""Votes, the watchdog's verdict, exit records."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from fastbeit.training import control
from fastbeit.training.control import Beat, StopVote, Watchdog, write_exit


def test_a_wish_is_agreed_on_one_step_later(world):
    vote = StopVote(world)
    assert vote.outcome() == 0
    vote.ask(control.EXIT_NONFINITE)
    vote.ask(control.EXIT_OK)
    assert vote.outcome() == 0  # the round before the wish
    assert vote.outcome() == control.EXIT_NONFINITE
    assert vote.close() == 0


def test_exit_record(tmp_path):
    write_exit(tmp_path, 75, 12, "SIGTERM")
    record = json.loads((tmp_path / "exit.json").read_text())
    assert (record["code"], record["step"], record["reason"]) == (75, 12, "SIGTERM")


class TwoRanks:
    rank, size = 0, 2


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ({0: (9, "computing", 0)}, "rank 1 has never reported"),
        ({0: (9, "computing", 0), 1: (9, "loading", 0)}, "rank 1 is furthest behind: step 9, load"),
        ({0: (8, "computing", 0), 1: (9, "loading", 0)}, "rank 0 is furthest behind: step 8, comp"),
        ({0: (9, "loading", 0), 1: (9, "computing", 90)}, "rank 1 itself has been silent for 90 s"),
    ],
)
def test_the_watchdog_names_the_rank_that_holds_up_the_others(tmp_path, beats, expected):
    watchdog = Watchdog(tmp_path / "beats", TwoRanks(), limit_s=3600)
    watchdog.close()
    now = time.time()
    for rank, (step, phase, age_s) in beats.items():
        path = tmp_path / "beats" / f"rank-{rank}.json"
        path.write_text(json.dumps(Beat(step, phase, now - age_s)))
    assert watchdog.culprit(now).startswith(expected)


def run_script(tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(
        "from fastbeit.training import control, distributed\n" + textwrap.dedent(body)
    )
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_stalled_step_ends_the_process_with_its_code_and_stacks(tmp_path):
    process = run_script(
        tmp_path,
        f"""
        import pathlib, time
        world = distributed.start("cpu")
        folder = pathlib.Path({str(tmp_path)!r}) / "run" / "heartbeats"
        watchdog = control.Watchdog(folder, world, limit_s=1.0)
        watchdog.at(4, "computing")
        time.sleep(60)
        """,
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == control.EXIT_STALLED
    assert "rank 0: no step finished for" in errors and "step 4, computing" in errors
    assert 'script.py", line' in errors  # where it hangs
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert record["code"] == control.EXIT_STALLED and record["step"] == 4


def test_first_signal_votes_second_exits_at_once(tmp_path):
    process = run_script(
        tmp_path,
        """
        import time
        world = distributed.start("cpu")
        vote = control.StopVote(world)
        trap = control.SignalTrap(vote, world)
        print("ready", flush=True)
        while not vote.outcome():
            time.sleep(0.05)
        print("agreed", trap.received, flush=True)
        time.sleep(60)
        """,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "agreed SIGUSR1\n"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == control.EXIT_INTERRUPTED
    assert time.monotonic() - started < 20
