"""scripts/make_hub_kernel.py: a folder that the kernel hub's loader can import, alone."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunPython = Callable[..., subprocess.CompletedProcess[str]]
# What the hub lets a kernel import; everything of its own is imported relatively.
ALLOWED = {"torch", "triton"} | set(sys.stdlib_module_names)


@pytest.fixture(scope="module")
def hub(repo_root: Path, run_python: RunPython, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "fastbeit-kernels"
    run_python(repo_root / "scripts" / "make_hub_kernel.py", folder)
    return folder


def test_the_layout_is_the_package_and_metadata(hub: Path, repo_root: Path) -> None:
    assert {path.name for path in hub.iterdir()} == {"build", "LICENSE"}
    variants = {path.name: path for path in (hub / "build").iterdir()}
    assert set(variants) == {"torch-cuda", "torch-cpu"}
    package = repo_root / "kernels" / "fastbeit_kernels"
    identifiers = set()
    for name, variant in variants.items():
        metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
        assert metadata["name"] == "fastbeit-kernels"
        assert metadata["backend"] == {"type": name.removeprefix("torch-")}
        assert metadata["version"] == 0 and metadata["license"] == "mit"
        assert metadata["id"].isidentifier()
        identifiers.add(metadata["id"])
        files = {
            path.relative_to(variant).as_posix(): path
            for path in variant.rglob("*")
            if path.is_file() and path != variant / "metadata.json"
        }
        digest = metadata["digest"]
        assert digest["algorithm"] == "sha256" and set(digest["files"]) == set(files)
        for place, path in files.items():
            content = path.read_bytes()
            assert content == (package / place).read_bytes()
            assert base64.b64decode(digest["files"][place]) == hashlib.sha256(content).digest()
        assert {"__init__.py", "reference.py", "_attention/ops.py"} <= set(files)
        assert not [place for place in files if place.startswith(("timm", "transformers", "_tune"))]
    assert len(identifiers) == 2


def test_nothing_is_imported_but_torch_and_triton(hub: Path) -> None:
    wrong = []
    for path in (hub / "build" / "torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            wrong += [(path, name) for name in names if name.split(".")[0] not in ALLOWED]
    assert not wrong


# Imports as kernels 0.17 does: by path, under the metadata's id.
LOAD = """
import importlib, importlib.util, json, pkgutil, sys
from pathlib import Path
import torch
variant = Path(sys.argv[1])
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for info in pkgutil.walk_packages(module.__path__, name + "."):
    importlib.import_module(info.name)  # nothing that was left out is missed
found = {}
for impl in ("reference", "triton"):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 5, 3, 2, 8, generator=generator).requires_grad_()
    bias = torch.randn(2, 5, 5, generator=generator).requires_grad_()
    weight = torch.ones(16, requires_grad=True)
    y = module.attention_packed(qkv, bias, impl=impl).flatten(2)
    y, normed = module.scale_residual_layer_norm(y, weight=weight, bias=None, impl=impl)
    grads = torch.autograd.grad((y * normed).square().sum(), (qkv, bias, weight))
    found[impl] = (y, normed, *grads)
for ours, expected in zip(found["triton"], found["reference"]):
    torch.testing.assert_close(ours, expected)
operators = torch._C._dispatch_get_all_op_names()
assert [each for each in operators if each.startswith(name + "::")]
assert not [each for each in operators if each.startswith("fastbeit_kernels::")]
assert not [each for each in sys.modules if each.split(".")[0] == "fastbeit_kernels"]
print("loaded", name)
"""


def test_it_loads_by_path_and_computes(hub: Path, run_python: RunPython, tmp_path: Path) -> None:
    done = run_python(
        "-c", LOAD, hub / "build" / "torch-cpu", cwd=tmp_path, env={"TRITON_INTERPRET": "1"}
    )
    assert done.stdout.startswith("loaded _fastbeit_kernels_cpu_")


def test_an_existing_folder_is_refused(
    repo_root: Path, run_python: RunPython, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("keep", encoding="utf-8")
    done = run_python(repo_root / "scripts" / "make_hub_kernel.py", tmp_path / "mine", expect=2)
    assert "exists" in done.stderr
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "keep"
