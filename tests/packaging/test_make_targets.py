"""The Makefile and .ci/run: what they run, what they refuse, and that a second run does nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

STAMPS = (".created", ".torch", ".installed", ".installed-dev")


@pytest.fixture
def checkout(repo_root: Path, tmp_path: Path) -> Path:
    """A folder with what make reads, and no environment yet."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(repo_root / name, folder / name)
    return folder


def make(
    folder: Path, *arguments: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    # A make around the tests must not hand its own flags and variables down.
    own = {
        "ARGS",
        "GPU_EXTRA",
        "PYTHON",
        "VENV",
        "MAKEFLAGS",
        "MAKELEVEL",
        "MAKEOVERRIDES",
        "MFLAGS",
    }
    env = {name: value for name, value in os.environ.items() if name not in own}
    if path is not None:
        env["PATH"] = path + os.pathsep + env["PATH"]
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def fake_environment(folder: Path) -> None:
    """Stamps newer than what they depend on, in the order in which make writes them."""
    (folder / ".venv").mkdir()
    now = time.time()
    for k, name in enumerate(STAMPS):
        stamp = folder / ".venv" / name
        stamp.touch()
        os.utime(stamp, (now + k, now + k))


@pytest.mark.parametrize("version", ["3.10", "3.14"])
def test_other_pythons_are_refused_by_name(checkout: Path, tmp_path: Path, version: str) -> None:
    python = program(tmp_path / "bin" / "python3", f"echo {version}")
    done = make(checkout, "setup", f"PYTHON={python}")
    assert done.returncode != 0
    assert "3.11, 3.12 or 3.13" in done.stderr
    assert f"{python} ({version})" in done.stderr
    assert not (checkout / ".venv" / ".created").exists()


def test_a_fitting_python_is_found_behind_one_that_does_not_fit(
    checkout: Path, tmp_path: Path
) -> None:
    program(tmp_path / "bin" / "python3", "echo 3.9")
    made = tmp_path / "made"
    program(
        tmp_path / "bin" / "python3.13",
        f'if [ "$1" = -c ]; then echo 3.13; else mkdir -p "$3"; echo "$@" > "{made}"; fi',
    )
    done = make(checkout, ".venv/.created", path=str(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    assert made.read_text(encoding="utf-8").strip() == "-m venv .venv"


def test_a_python_without_venv_is_explained(checkout: Path, tmp_path: Path) -> None:
    python = program(tmp_path / "bin" / "python3", '[ "$1" = -c ] && echo 3.12')
    done = make(checkout, "setup", f"PYTHON={python}")
    assert done.returncode != 0
    assert "python3-venv" in done.stderr


def test_pretrain_runs_the_demo_with_no_flag(checkout: Path) -> None:
    fake_environment(checkout)
    done = make(checkout, "--dry-run", "pretrain")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ".venv/bin/torchrun --standalone -m fastbeit.pretrain"


def test_test_runs_all_tests(checkout: Path) -> None:
    fake_environment(checkout)
    assert make(checkout, "--dry-run", "test").stdout.strip() == ".venv/bin/python -m pytest -q"


def test_a_moved_pin_is_installed(checkout: Path) -> None:
    fake_environment(checkout)
    later = time.time() + 60
    os.utime(checkout / "constraints.txt", (later, later))
    commands = make(checkout, "--dry-run", "pretrain").stdout
    assert "-c constraints.txt setuptools torch" in commands
    assert "--no-build-isolation -e" in commands
    assert commands.index("setuptools torch") < commands.index("--no-build-isolation")


def test_gpu_extras_follow_the_driver(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".venv").mkdir()
    program(tmp_path / "with" / "nvidia-smi", "exit 0")
    with_driver = make(checkout, "--dry-run", "setup", path=str(tmp_path / "with")).stdout
    assert '-e ".[gpu]"' in with_driver
    cuda12 = make(checkout, "--dry-run", "setup", "GPU_EXTRA=cuda12", path=str(tmp_path / "with"))
    assert '-e ".[cuda12]"' in cuda12.stdout
    if Path("/proc/driver/nvidia/version").exists():
        return
    program(tmp_path / "without" / "nvidia-smi", "exit 9")  # its code when no driver answers
    without = make(checkout, "--dry-run", "setup", path=str(tmp_path / "without")).stdout
    assert '-e "."' in without


def test_ci_runs_make_test_and_nothing_else(repo_root: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    program(tmp_path / "bin" / "make", f'echo "$PWD: $*" >> "{calls}"; exit 7')
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(repo_root / ".ci" / "run")],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert calls.read_text(encoding="utf-8").splitlines() == [f"{repo_root}: test"]
    assert done.returncode == 7
