"""Threads on a CPU: a process's share of the cores, unless the user said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbeit import hardware
from fastbeit.training import threads

CPU = torch.device("cpu")


@pytest.fixture
def chosen(monkeypatch) -> list[int]:
    """What is set, without setting it; nothing is asked for by the environment."""
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    for name in (*threads.SETTINGS, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "physical_cores", lambda: 12.0)
    return counts


@pytest.mark.parametrize(("processes", "expected"), [(1, 12), (2, 6), (5, 2), (16, 1)])
def test_cores_are_shared_out(chosen, processes, expected) -> None:
    reason = threads.settle_threads(CPU, processes)
    assert chosen == [expected]
    assert reason.startswith(f"12 physical cores for {processes} process")


def test_the_users_setting_stays(chosen, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.settle_threads(CPU, 2) == "as OMP_NUM_THREADS says"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    assert threads.settle_threads(CPU, 2) == "as MKL_NUM_THREADS says"
    assert threads.settle_threads(torch.device("cuda"), 2) == ""
    assert chosen == []


@pytest.mark.parametrize(("users", "expected"), [({}, "6"), ({"OMP_NUM_THREADS": "1"}, "1")])
def test_torchruns_one_thread_is_told_from_the_users(tmp_path, users, expected) -> None:
    """A real torchrun with two processes, with and without the variable in its environment."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, torch\n"
        "from fastbeit import hardware\n"
        "from fastbeit.training import threads\n"
        "hardware.physical_cores = lambda: 12.0\n"
        "set_to = [os.environ['OMP_NUM_THREADS']]\n"
        "torch.set_num_threads = lambda count: set_to.append(str(count))\n"
        "threads.settle_threads(torch.device('cpu'), int(os.environ['LOCAL_WORLD_SIZE']))\n"
        f"open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(set_to[-1])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in threads.SETTINGS}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*command, "--nproc-per-node=2", str(worker)],
        env={**environment, **users},
        check=True,
        capture_output=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert [(tmp_path / rank).read_text() for rank in "01"] == [expected] * 2


def test_two_threads_of_a_core_count_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5}, raising=False)
    monkeypatch.setattr(hardware, "CPUS", tmp_path)
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    for number, siblings in ((0, "0,4"), (1, "1,5"), (2, "2,6"), (5, "1,5")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert hardware.physical_cores() == 3.0
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert hardware.physical_cores() == 1.5
