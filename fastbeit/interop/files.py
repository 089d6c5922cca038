"""Weight files, read without executing anything that they name, and written in one move.

safetensors holds nothing but tensors. ``.pth`` and ``.bin`` are pickles: PyTorch's weights-only
unpickler reads them with one addition, ``argparse.Namespace``, because the official code stores
its arguments beside the weights. A Namespace is filled by assigning attributes; that runs no code.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]

PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
# Under these keys other people's training code keeps the weights among the rest.
_WRAPPERS = ("model", "module", "state_dict", "model_state_dict")


class WeightsError(ValueError):
    """A weight file that can't be read, or that doesn't fit the model; names the file and why."""


def read_tensors(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors by name, and the file's text metadata, of a weight file on the CPU.

    Args:
        path: a safetensors file, a ``.pth``/``.bin`` pickle, or a directory that holds
            ``model.safetensors`` or ``pytorch_model.bin``. The content decides, not the suffix.

    Raises:
        WeightsError: there is no such file; it is not weights; it is truncated; it names code.
    """
    path = _file_of(Path(path))
    with path.open("rb") as file:
        head = file.read(512)
    _refuse_what_is_no_weights(path, head)
    if head[8:9] == b"{":
        return _read_safetensors(path)
    return _read_pickle(path), {}


def _file_of(path: Path) -> Path:
    if path.is_dir():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (path / name).is_file():
                return path / name
        raise WeightsError(
            f"{path} is a directory without model.safetensors or pytorch_model.bin in it"
        )
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    return path


def _refuse_what_is_no_weights(path: Path, head: bytes) -> None:
    start = head.lstrip().lower()
    if not head:
        raise WeightsError(f"{path} is empty: the download or the copy did not finish")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise WeightsError(
            f"{path} is a web page, not weights: the address was of a page about the file, or the "
            "server answered with an error page; download the file itself"
        )
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not weights: run `git lfs pull` where it came from"
        )


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}): truncated or damaged, "
            "fetch it again"
        ) from error


def _read_pickle(path: Path) -> Tensors:
    try:
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # about what is then read, or refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(_why_not_unpickled(path, str(error))) from None
    except Exception as error:  # whatever a damaged archive sets off in the reader
        cause = str(error).split("\n")[0][:200] or type(error).__name__
        raise WeightsError(
            f"{path} can't be read as weights ({cause}): truncated, damaged or something else; "
            "fetch it again"
        ) from error
    return _unwrap(path, content)


def _why_not_unpickled(path: Path, message: str) -> str:
    named = re.search(r"Unsupported (?:global|class|operand)[^\n]*?((?:\w+\.)+\w+)", message)
    named = named or re.search(r"GLOBAL ((?:\w+\.)+\w+)", message)
    if named is None:
        return (
            f"{path} can't be read as weights: it is no pickle of tensors, or it is damaged. "
            "Nothing in it was executed"
        )
    return (
        f"{path} is refused: its pickle names {named.group(1)}, which is code, not weights. "
        "Nothing in it was executed. If you trust its maker, have it sent as safetensors"
    )


def _unwrap(path: Path, content: object) -> Tensors:
    """The mapping of tensors inside a checkpoint dictionary, without a common ``module.``."""
    for _ in range(len(_WRAPPERS)):
        inner = None
        if isinstance(content, Mapping):
            inner = next(
                (content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None
            )
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not named tensors")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        held = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise WeightsError(f"{path} holds no named tensors, only {held}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write a safetensors file, or ``{"model": tensors}`` for ``.pth``, whole or not at all.

    Raises:
        ValueError: a suffix that says neither.
    """
    if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise ValueError(
            f"{path}: the suffix must be .safetensors or one of {', '.join(PICKLE_SUFFIXES)}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        if path.suffix == ".safetensors":
            plain = _without_shared_memory(plain)
            save_file(plain, partial, metadata={"format": "pt", **metadata})
        else:
            torch.save({"model": plain}, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _without_shared_memory(tensors: Tensors) -> Tensors:
    """Views become tensors of their own: safetensors refuses two names for one memory."""
    return {
        name: tensor.clone()
        if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.storage_offset()
        else tensor
        for name, tensor in tensors.items()
    }


def write_text(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
