"""The wheel and the sdist: built from a copy of the tree, opened, installed, and used elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

RunPython = Callable[..., subprocess.CompletedProcess[str]]
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", "runs", "tests", ".*_cache"
)
PACKAGES = {"fastbeit": "fastbeit", "fastbeit_kernels": "kernels/fastbeit_kernels"}


class Built(NamedTuple):
    """Where the distributions lie."""

    sdist: Path
    wheel: Path
    """Built from the unpacked sdist, as an installer without a matching wheel does."""


@pytest.fixture(scope="module")
def built(
    repo_root: Path, run_python: RunPython, tmp_path_factory: pytest.TempPathFactory
) -> Built:
    folder = tmp_path_factory.mktemp("distributions")
    # A copy: setuptools writes build/ and *.egg-info beside setup.py.
    source = shutil.copytree(repo_root, folder / "source", ignore=IGNORED)
    out = folder / "dist"
    run_python("-m", "build", "--no-isolation", "--outdir", out, source, cwd=folder)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def installed(
    built: Built, run_python: RunPython, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run_python(*pip, "--target", target, built.wheel, cwd=target)
    return target


def files_of(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_both_packages_and_nothing_else(built: Built, repo_root: Path) -> None:
    names = zipfile.ZipFile(built.wheel).namelist()
    version = built.wheel.name.split("-")[1]
    assert built.wheel.name.endswith("-py3-none-any.whl")
    info = f"fastbeit-{version}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    for package, place in PACKAGES.items():
        in_wheel = {
            name.removeprefix(f"{package}/") for name in names if name.startswith(f"{package}/")
        }
        # A new data file that package_data forgets, or a folder without __init__.py, shows here.
        assert in_wheel == files_of(repo_root / place)
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(names)


def test_the_sdist_holds_what_the_wheel_needs(built: Built, repo_root: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "README.md", "LICENSE", "NOTICE", "constraints.txt", "CHANGELOG.md"}
    for place in PACKAGES.values():
        wanted |= {f"{place}/{name}" for name in files_of(repo_root / place)}
    assert wanted <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


def test_the_metadata_tells_what_is_needed(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode("utf-8")
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert sorted(requirement.split(">")[0] for requirement in required) == sorted(
        ["torch", "numpy", "pillow", "safetensors", "tyro", "rich", "matplotlib"]
    )
    assert "Requires-Python: >=3.11" in metadata
    assert "# fastbeit" in metadata


USE = """
import sys
from pathlib import Path
import fastbeit, fastbeit_kernels
target = Path(sys.argv[1]).resolve()
for module in (fastbeit, fastbeit_kernels):
    assert Path(module.__file__).resolve().is_relative_to(target), module.__file__
from fastbeit.data import open_source
for split in ("train", "validation", "test"):
    source = open_source("demo", split=split)
    assert source.read(len(source) - 1).startswith(b"\\x89PNG")
    print(split, len(source), len(source.classes))
from fastbeit.tokenizer import load_tokenizer
print("codes", load_tokenizer("demo").vocab_size)
"""


def test_the_installed_wheel_reads_its_own_data(
    installed: Path, run_python: RunPython, tmp_path: Path
) -> None:
    done = run_python("-c", USE, installed, cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(lines) == {"train", "validation", "test", "codes"}
    for split in ("train", "validation", "test"):
        images, classes = map(int, lines[split].split())
        assert images >= 1000
        assert classes == 10
    assert int(lines["codes"]) >= 16


def test_the_installed_wheel_adds_no_module_called_kernels(
    installed: Path, run_python: RunPython, tmp_path: Path
) -> None:
    assert not (installed / "kernels").exists()
    code = "import importlib.util as u; print(u.find_spec('fastbeit_kernels').origin)"
    done = run_python("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert Path(done.stdout.strip()) == installed / "fastbeit_kernels" / "__init__.py"


def test_the_distributions_are_small_enough_to_download(built: Built) -> None:
    for path in built:
        assert path.stat().st_size < 20 * 2**20, f"{path.name}: {path.stat().st_size} bytes"
