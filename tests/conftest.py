"""What all tests share: the repository's root, fresh Python processes, and peers that load."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

# Before any import of matplotlib or of Hugging Face's libraries: no window, no network.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

# Triton's own functions are defined, for the interpreter or for a GPU, when it is first imported,
# so this can't wait for the tests that interpret kernels. With a GPU the same tests run on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

REPO_ROOT = Path(__file__).resolve().parent.parent

# Timing on a shared CI machine says nothing about correctness, and a test that fails must fail
# again when it is looked into: no deadline, and the same examples in every run.
hypothesis.settings.register_profile("fastbeit", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fastbeit")

if torch.version.cuda is None:
    # The peers timm and transformers import torchvision, whose common wheel is built for CUDA: its
    # operators do not load beside a CPU-only torch, and the module that gives them shape rules
    # then raises. The peers' BEiT uses none of those operators, so an empty module stands in.
    sys.modules.setdefault(
        "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none is visible"))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds setup.py."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python in a fresh process: ``run_python("-c", code, cwd=..., env={...}, expect=0)``.

    ``env`` is added to this process's environment. The exit code must be ``expect`` (None: any);
    if not, the test fails and shows what the process wrote.
    """

    def run(
        *arguments: str | Path,
        cwd: Path | str = REPO_ROOT,
        env: dict[str, str] | None = None,
        expect: int | None = 0,
        timeout_s: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if expect is not None and done.returncode != expect:
            pytest.fail(
                f"python {' '.join(map(str, arguments))[:200]}\nexit code {done.returncode}, "
                f"expected {expect}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
            )
        return done

    return run
