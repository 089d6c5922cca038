"""Imports go one way, and importing needs no GPU, no Triton, no DALI.

The layers are read off the source (every import statement, those inside functions too); what an
import really does is watched in fresh processes.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

RunPython = Callable[..., subprocess.CompletedProcess[str]]

# From the bottom up. A part may import itself and whatever stands in a line above its own.
LAYERS: list[set[str]] = [
    {"fastbeit_kernels"},
    {"fastbeit.batch", "fastbeit.flags", "fastbeit.hardware"},
    {"fastbeit.environment"},
    {"fastbeit.data", "fastbeit.model"},
    {"fastbeit.tokenizer", "fastbeit.interop"},
    {"fastbeit.training"},
    {"fastbeit.evaluation", "fastbeit.report"},
    {"fastbeit.training.finish"},  # the end of a run: looks back on all of it
    {"fastbeit.recipes"},
    {"fastbeit.training.forecast"},  # --plan: knows what recipes expect
    {"fastbeit.cli"},
    {"fastbeit.pretrain", "fastbeit.doctor"},
    {"fastbeit.profile", "fastbeit.data.tune"},  # commands about training's parts
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# fastbeit_kernels serves people without fastbeit: these are all it may need. Its adapters for timm
# and transformers import the library that they adapt to.
KERNELS_NEED = {"torch", "triton", "fastbeit_kernels"}
ADAPTERS = {"timm.py", "transformers.py"}


def part_of(module: str) -> str:
    """``fastbeit.data`` for ``fastbeit.data.plan``, ``fastbeit_kernels`` for all of it."""
    if module in LEVEL:
        return module
    return ".".join(module.split(".")[: 2 if module.startswith("fastbeit.") else 1])


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "fastbeit":  # `from fastbeit import environment` names a part
                yield from ((node.lineno, f"fastbeit.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def test_every_part_has_its_layer(repo_root: Path) -> None:
    found = {
        f"fastbeit.{path.stem}"
        for path in (repo_root / "fastbeit").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    } - {"fastbeit.__init__"}
    assert found <= set(LEVEL), f"give these a layer in this test: {found - set(LEVEL)}"
    assert {
        part for part in LEVEL if part.startswith("fastbeit.") and part.count(".") == 1
    } <= found


def test_layers_import_downwards_only(repo_root: Path) -> None:
    wrong = []
    for path in sorted((repo_root / "fastbeit").rglob("*.py")):
        own = part_of(".".join(path.relative_to(repo_root).with_suffix("").parts))
        for line, module in imported_modules(path):
            part = part_of(module)
            if part in LEVEL and part != own and LEVEL[part] >= LEVEL.get(own, -1):
                wrong.append(f"{path.relative_to(repo_root)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_kernels_need_torch_and_triton_only(repo_root: Path) -> None:
    allowed = KERNELS_NEED | sys.stdlib_module_names
    wrong = []
    for path in sorted((repo_root / "kernels" / "fastbeit_kernels").rglob("*.py")):
        for line, module in imported_modules(path):
            if module.split(".")[0] not in allowed and path.name not in ADAPTERS:
                wrong.append(f"{path.relative_to(repo_root)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


# Runs before anything else in a fresh process: the names refuse to be imported, and attempts by
# this project's code are written down, also where it catches the error.
WATCH = """
import sys
class Refuse:
    names = set(sys.argv[1].split(","))
    attempts = []
    def find_spec(self, name, path=None, target=None):
        top = name if name.startswith("nvidia.") else name.split(".")[0]
        if top not in self.names:
            return None
        frame, callers = sys._getframe(1), []
        while frame is not None:
            callers.append(frame.f_globals.get("__name__", "").split(".")[0])
            frame = frame.f_back
        if {"fastbeit", "fastbeit_kernels"} & set(callers):
            self.attempts.append(name)
        raise ImportError(f"{name} is refused in this test")
refuse = Refuse()
sys.meta_path.insert(0, refuse)

import torch
queried = []
def trap(name, real):
    def query(*args, **kwargs):
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] != "torch" or STRICT:
            queried.append(name)
        return real(*args, **kwargs)
    return query
for name in (
    "is_available", "device_count", "init", "_lazy_init", "current_device", "is_initialized",
    "get_device_name", "get_device_capability", "get_device_properties", "mem_get_info",
    "is_bf16_supported", "get_arch_list",
):
    setattr(torch.cuda, name, trap(name, getattr(torch.cuda, name)))
"""
OPTIONAL = "nvidia.dali,xformers,apex,amp_C,wandb,tensorboard,timm,transformers,torchvision"


@pytest.mark.parametrize("package", ["fastbeit", "fastbeit_kernels"])
def test_importing_queries_no_gpu_and_loads_no_optional_part(
    run_python: RunPython, package: str
) -> None:
    code = (
        "STRICT = True\n" + WATCH + f"import {package}\n"
        "assert not queried, queried\n"
        "assert not refuse.attempts, refuse.attempts\n"
        "assert 'triton' not in sys.modules\n"
        "assert ('fastbeit' in sys.modules) == ('" + package + "' == 'fastbeit')\n"
    )
    run_python("-c", code, f"{OPTIONAL},triton")


def test_every_module_imports_without_optional_parts(run_python: RunPython) -> None:
    """Only the DALI loader's own modules may import DALI when they are imported, and only the
    kernels' own, and their tools, Triton."""
    code = (
        "STRICT = False\n" + WATCH + "import importlib, pkgutil, fastbeit, fastbeit_kernels\n"
        "seen = []\n"
        "for package in (fastbeit, fastbeit_kernels):\n"
        "    for info in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if info.name.startswith('fastbeit.data.dali'):\n"
        "            continue\n"
        "        if info.name.startswith(('fastbeit_kernels._attention.',\n"
        "                                 'fastbeit_kernels._layer_norm.',\n"
        "                                 'fastbeit_kernels._cross_entropy.',\n"
        "                                 'fastbeit_kernels._linear_argmax.',\n"
        "                                 'fastbeit_kernels._embedding.',\n"
        "                                 'fastbeit_kernels._gelu.',\n"
        "                                 'fastbeit_kernels._convolution.',\n"
        "                                 'fastbeit_kernels._products',\n"
        "                                 'fastbeit_kernels._rel_pos_bias.',\n"
        "                                 'fastbeit_kernels._inspect.',\n"
        "                                 'fastbeit_kernels._tune.',\n"
        "                                 'fastbeit_kernels._launches.')):\n"
        "            continue\n"
        "        if info.name in ('fastbeit_kernels.timm', 'fastbeit_kernels.transformers',\n"
        "                         'fastbeit_kernels.inspect', 'fastbeit_kernels.tune'):\n"
        "            continue\n"
        "        importlib.import_module(info.name)\n"
        "        seen.append(info.name)\n"
        "assert not queried, queried\n"
        "assert not refuse.attempts, refuse.attempts\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*seen)\n"
    )
    seen = run_python("-c", code, f"{OPTIONAL},triton").stdout.split()
    assert {"fastbeit.pretrain", "fastbeit.interop", "fastbeit.data.plan"} <= set(seen)


def test_kernels_work_without_triton(run_python: RunPython) -> None:
    code = (
        # What Python itself notes of a module that is not there.
        "STRICT = True\n" + WATCH + "sys.modules['triton'] = None\n"
        "from fastbeit_kernels import linear_argmax\n"
        "x, weight = torch.eye(3), torch.eye(3).flip(0)\n"
        "assert linear_argmax(x, weight).tolist() == [2, 1, 0]\n"
        "try:\n"
        "    linear_argmax(x, weight, impl='triton')\n"
        "except RuntimeError as error:\n"
        "    assert 'triton is not installed' in str(error), error\n"
        "    print('refused')\n"
    )
    assert run_python("-c", code, OPTIONAL).stdout.strip() == "refused"


def test_the_watch_sees_what_it_is_for(run_python: RunPython, tmp_path: Path) -> None:
    package = tmp_path / "fastbeit"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "torch.cuda.is_available()\n"
        "try:\n    import apex.optimizers\nexcept ImportError:\n    print('no apex')\n",
        encoding="utf-8",
    )
    code = "STRICT = True\n" + WATCH + "import fastbeit\nprint(queried, refuse.attempts)"
    done = run_python("-c", code, OPTIONAL, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout.splitlines() == ["no apex", "['is_available'] ['apex']"]
