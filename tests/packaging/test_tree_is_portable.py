"""Nothing in the tree names the machine it was made on, a package host, or an unlinted line."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RunPython = Callable[..., subprocess.CompletedProcess[str]]

# Written in pieces, so that this file does not match itself.
HOSTS = [
    "pypi" + r"\.org",
    "python" + r"hosted\.org",
    "download" + r"\.pytorch\.org",
    "pypi" + r"\.nvidia\.com",
    "registry" + r"\.npmjs",
    "registry" + r"\.yarnpkg",
    "conda" + r"\.anaconda\.org",
    "deb" + r"\.debian\.org",
]
OPTIONS = ["--" + "index-url", "--" + "extra-index-url", "--" + "find-links"]
# An absolute path of a private folder: at a word's start, so that a/work/b is left alone.
PLACES = [r"(?<![\w.~-])/" + place + "/" for place in ("work", "root", "farm", "home/" + r"\w+")]
PATTERN = re.compile("|".join(HOSTS + OPTIONS + PLACES), re.IGNORECASE)


def tracked(repo_root: Path) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=repo_root, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [repo_root / name for name in listed.stdout.split("\0") if name]


@pytest.mark.parametrize(
    "line",
    [
        "https://" + "pypi" + ".org/simple",
        "pip install --" + "extra-index-url X",
        "see /" + "work/notes",
        "'/" + "root/.cache'",
    ],
)
def test_the_pattern_finds_what_it_is_for(line: str) -> None:
    assert PATTERN.search(line)


@pytest.mark.parametrize("line", ["framework/root/x", "a/work/b", "~/root/", "registry of recipes"])
def test_the_pattern_leaves_ordinary_words_alone(line: str) -> None:
    assert not PATTERN.search(line)


def test_no_machine_and_no_package_host_is_named(repo_root: Path) -> None:
    found = []
    for path in tracked(repo_root):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if b"\0" in data[:8192]:  # tensors and archives
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
            if PATTERN.search(line):
                found.append(f"{path.relative_to(repo_root)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_nothing_large_or_private_is_tracked(repo_root: Path) -> None:
    for path in tracked(repo_root):
        assert not path.is_symlink(), f"{path} is a link: it may point outside the repository"
        assert path.name not in (".env", ".netrc", ".pypirc"), path
        assert not path.is_file() or path.stat().st_size <= 20 * 2**20, path


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check", "--diff")], ids=str)
def test_ruff_is_content(
    run_python: RunPython, repo_root: Path, arguments: tuple[str, ...]
) -> None:
    done = run_python("-m", "ruff", *arguments, "--no-cache", ".", cwd=repo_root, expect=None)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\nmend it with `make format`"


def test_files_can_be_held_in_a_head(repo_root: Path) -> None:
    long = {}
    for path in tracked(repo_root):
        if path.suffix == ".py" and path.is_file():
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > 320:
                long[str(path.relative_to(repo_root))] = lines
    assert not long, f"each of these is perhaps two files: {long}"
