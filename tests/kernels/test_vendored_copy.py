"""Someone copies the folder under a name of their own: the kernels' tests pass on the copy.

``test_triton_operators.py`` shows a copy and the original side by side in one process.
"""

from __future__ import annotations

import ast
import re
import shutil

import pytest

NAME = "their_kernels"
# Arguments and their refusals, the reference, and Triton kernels of two operations, forward and
# backward: what takes seconds, and imports nothing else of this repository.
CHOSEN = {
    "test_kernel_arguments.py": "test_kernel_arguments",
    "test_attention_reference.py": "test_attention_reference",
    "test_triton_attention.py": "packed or masks_by or may_repeat",
    "test_triton_layer_norm.py": "large_mean or one_gradient",
}
PLUGIN = f"""
import sys
from pathlib import Path

def pytest_sessionfinish(session):
    import torch

    loaded = {{name.split(".")[0] for name in sys.modules}}
    assert "fastbeit_kernels" not in loaded and "fastbeit" not in loaded
    assert Path(sys.modules["{NAME}"].__file__).is_relative_to(Path(__file__).parent)
    spaces = {{name.split("::")[0] for name in torch._C._dispatch_get_all_op_names()}}
    assert "{NAME}" in spaces and "fastbeit_kernels" not in spaces
"""


@pytest.fixture(scope="module")
def vendored(repo_root, tmp_path_factory):
    """A tree like the repository's, in which every fastbeit_kernels is called their_kernels."""
    root = tmp_path_factory.mktemp("vendored")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(
        repo_root / "kernels" / "fastbeit_kernels", root / "kernels" / NAME, ignore=ignored
    )
    for place in ("tests/conftest.py", *(f"tests/kernels/{name}" for name in CHOSEN)):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        text = (repo_root / place).read_text(encoding="utf-8")
        (root / place).write_text(text.replace("fastbeit_kernels", NAME), encoding="utf-8")
    shutil.copy(repo_root / "pyproject.toml", root)
    (root / "finish_plugin.py").write_text(PLUGIN, encoding="utf-8")
    return root


def test_a_renamed_copy_passes_its_tests(run_python, vendored) -> None:
    done = run_python(
        *("-m", "pytest", "-q", "-p", "finish_plugin", "-p", "no:cacheprovider"),
        *("tests/kernels", "-k", " or ".join(CHOSEN.values())),
        cwd=vendored,
        env={"PYTHONPATH": f"{vendored / 'kernels'}:{vendored}"},
    )
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed and int(passed[1]) > 60 and "skipped" not in done.stdout, done.stdout


def test_the_package_never_names_itself(repo_root) -> None:
    """Absolute imports of itself would reach the original, or nothing."""
    for path in (repo_root / "kernels" / "fastbeit_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not [name for name in names if name.startswith("fastbeit")], path
