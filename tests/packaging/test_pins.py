"""constraints.txt pins everything that setup.py asks for, and what `make` installed obeys it."""

from __future__ import annotations

import platform
import re
import runpy
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def pins(repo_root: Path) -> dict[str, str]:
    lines = (repo_root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned: dict[str, str] = {}
    for line in lines:
        if not line or line.startswith("#"):
            continue
        assert re.fullmatch(r"[a-z0-9-]+==[^\s;]+", line), f"not an exact pin: {line!r}"
        name, version = line.split("==")
        assert name not in pinned, f"{name} is pinned twice"
        pinned[name] = version
    return pinned


@pytest.fixture
def setup_arguments(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
    monkeypatch.chdir(repo_root)
    runpy.run_path(str(repo_root / "setup.py"), run_name="__main__")
    return seen


def test_every_requirement_is_pinned_within_its_bounds(
    setup_arguments: dict[str, Any], pins: dict[str, str]
) -> None:
    extras = setup_arguments["extras_require"]
    assert {"gpu", "cuda12", "bench", "dev"} <= set(extras)
    listed = [
        *setup_arguments["install_requires"],
        *(r for extra in extras.values() for r in extra),
    ]
    for requirement in map(Requirement, listed):
        pinned = pins.get(canonical(requirement.name))
        assert pinned is not None, f"constraints.txt has no pin for {requirement.name}"
        assert pinned in requirement.specifier, f"{requirement} excludes the pinned {pinned}"


def test_dev_brings_dali_on_linux_x86_64_only(setup_arguments: dict[str, Any]) -> None:
    dali = [
        requirement
        for requirement in map(Requirement, setup_arguments["extras_require"]["dev"])
        if requirement.name.startswith("nvidia-dali")
    ]
    assert len(dali) == 1
    marker = dali[0].marker
    assert marker is not None
    assert marker.evaluate({"sys_platform": "linux", "platform_machine": "x86_64"})
    assert not marker.evaluate({"sys_platform": "linux", "platform_machine": "aarch64"})
    assert not marker.evaluate({"sys_platform": "darwin", "platform_machine": "x86_64"})


def test_python_and_version(setup_arguments: dict[str, Any]) -> None:
    import fastbeit

    assert setup_arguments["version"] == fastbeit.__version__
    supported = SpecifierSet(setup_arguments["python_requires"])
    assert all(version in supported for version in ("3.11.0", "3.12.0", "3.13.0"))
    assert "3.10.14" not in supported


@pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64"),
    reason="DALI is made for Linux on x86-64 (and some Arm servers) only",
)
def test_dali_is_there_so_that_its_tests_run() -> None:
    """Tests of the DALI loader would be skipped without it, and nobody would see."""
    assert util.find_spec("nvidia") is not None and util.find_spec("nvidia.dali") is not None, (
        "DALI is missing: tests need it on this system; run `make test`, which installs it, or "
        'pip install -c constraints.txt -e ".[dev]"'
    )


def test_what_make_installed_is_what_is_pinned(pins: dict[str, str], repo_root: Path) -> None:
    if Path(sys.prefix).resolve() != (repo_root / ".venv").resolve():
        pytest.skip("not in the environment that make sets up, whose versions are pinned")
    own = {"fastbeit", "pip"}
    unpinned, other = [], []
    # Not all of sys.path: setuptools adds a folder of copies of its own to it.
    site = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    for distribution in metadata.distributions(path=list(site)):
        name = canonical(distribution.metadata["Name"])
        # A CUDA build of torch requires its NVIDIA libraries by exact version itself.
        if name in own or (name not in pins and name.startswith(("nvidia-", "cuda-"))):
            continue
        if name not in pins:
            unpinned.append(name)
        elif Version(distribution.version).public != pins[name]:
            other.append(f"{name} {distribution.version}, pinned {pins[name]}")
    assert not unpinned, f"installed by make, but not in constraints.txt: {sorted(unpinned)}"
    assert not other
