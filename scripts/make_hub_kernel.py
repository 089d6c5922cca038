"""Write the kernels in the layout of Hugging Face's kernel hub, out of kernels/fastbeit_kernels.

    python scripts/make_hub_kernel.py FOLDER            # FOLDER must not exist
    python scripts/make_hub_kernel.py FOLDER --version 1

A kernel in pure Python needs no build there: a repository holds ``build/torch-<backend>/``, which
is the package itself, with a ``metadata.json`` that has a digest of its files
(https://huggingface.co/docs/kernels/kernel-requirements; seen loaded by
``get_local_kernel`` of kernels 0.17.2). The package is imported there under its ``id``, so its
operators are ``torch.ops.<id>``; the id ends in a digest of the files, by which two versions live
side by side in a process.

The same files serve ``cuda`` and ``cpu``, where the reference runs. Left out are the adapters for
timm and transformers, because a hub kernel may import the standard library, torch and Triton only,
and the tools that compile, time and tune. Version 0 says, by the hub's convention, that the API may
still change. One of the hub's rules isn't kept: it asks for Python 3.9, and this package for 3.11.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kernels" / "fastbeit_kernels"
NAME = "fastbeit-kernels"
BACKENDS = ("cuda", "cpu")
LEFT_OUT = (
    *("_adapt.py", "timm.py", "transformers.py"),
    *("inspect.py", "tune.py", "_inspect", "_launches", "_tune"),
)


def digest_of(folder: Path) -> dict[str, str]:
    """Base64 of each file's SHA-256, by its path in ``folder``, as the hub checks a download."""
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def identifier(backend: str, files: dict[str, str]) -> str:
    """A module's name that no other content has."""
    content = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return f"_{NAME.replace('-', '_')}_{backend}_{content[:10]}"


def write_variant(folder: Path, backend: str, version: int) -> Path:
    variant = folder / "build" / f"torch-{backend}"
    ignored = shutil.ignore_patterns("__pycache__", "*.py[cod]", *LEFT_OUT)
    shutil.copytree(PACKAGE, variant, ignore=ignored)
    files = digest_of(variant)
    metadata = {
        "name": NAME,
        "id": identifier(backend, files),
        "version": version,
        "license": "mit",
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    text = json.dumps(metadata, indent=2) + "\n"
    (variant / "metadata.json").write_text(text, encoding="utf-8")
    return variant


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    parser.add_argument("--version", type=int, default=0, help="the kernel's major version")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        print(f"{options.folder} exists; name a folder that doesn't", file=sys.stderr)
        return 2
    for backend in BACKENDS:
        print(write_variant(options.folder, backend, options.version))
    shutil.copy(ROOT / "LICENSE", options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
