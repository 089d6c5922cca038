"""The top-level module name `kernels` stays Hugging Face's, also from the repository's root.

`kernels/` is a folder there, without ``__init__.py``: on sys.path it can only be an empty
namespace, which a real package found on any later entry beats (PEP 420).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

RunPython = Callable[..., subprocess.CompletedProcess[str]]
SHOW = "import fastbeit_kernels, kernels; print(kernels.__name__, kernels.__file__)"
# Stands in for torchvision's shape rules, which do not load beside a CPU-only torch (conftest.py).
PEERS = (
    "import sys, types, torch\n"
    "if torch.version.cuda is None:\n"
    "    name = 'torchvision._meta_registrations'\n"
    "    sys.modules[name] = types.ModuleType(name)\n"
)


def real_kernels_installed() -> bool:
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder for the end of sys.path that holds a package called kernels."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("__version__ = '0.99'\n", encoding="utf-8")
    (site / "show_kernels.py").write_text(SHOW + "\n", encoding="utf-8")
    return site


def last_on_path(folder: Path) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{before}{os.pathsep}{folder}" if before else str(folder)}


@pytest.mark.parametrize("how", [("-c", SHOW), ("-m", "show_kernels")], ids=["-c", "-m"])
def test_a_package_called_kernels_wins(
    run_python: RunPython, repo_root: Path, stand_in: Path, how: tuple[str, str]
) -> None:
    done = run_python(*how, cwd=repo_root, env=last_on_path(stand_in))
    assert done.stdout.split() == ["kernels", str(stand_in / "kernels" / "__init__.py")]


@pytest.mark.skipif(real_kernels_installed(), reason="Hugging Face's kernels is installed")
def test_without_one_transformers_sees_none(run_python: RunPython, repo_root: Path) -> None:
    code = PEERS + (
        "import importlib.util\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert spec is None or spec.origin is None, spec\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert is_kernels_available() is False\n"
        "from transformers.models.beit.modeling_beit import BeitModel\n"
        "import fastbeit_kernels\n"
        "assert not any(name.split('.')[0] == 'kernels' and vars(module).get('__file__')\n"
        "               for name, module in sys.modules.items())\n"
        "print(BeitModel.__name__)\n"
    )
    assert run_python("-c", code, cwd=repo_root).stdout.strip() == "BeitModel"


def test_the_folder_is_no_package(repo_root: Path) -> None:
    assert (repo_root / "kernels" / "fastbeit_kernels" / "__init__.py").is_file()
    assert not (repo_root / "kernels" / "__init__.py").exists()
