"""``config.json``: a configuration on disk, written whole, read strictly, compared by effect."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastbeit import __version__
from fastbeit.training.config import PretrainConfig

VERSION_KEY = "fastbeit_version"

WITHOUT_EFFECT = frozenset(
    {
        # Names and places.
        "recipe",
        "model.num_classes",  # the classifier's, which pre-training has not
        "run.run_dir",
        # How the same step is computed: other ranks, micro-batches or kernels only round
        # differently. (Precision and the loader are not here: they move results by more.)
        "run.micro_batch",
        "run.shard",
        "run.device",
        "run.kernels",
        "run.attention",
        "run.compile",
        "run.activation_checkpointing",
        "run.cuda_graph",
        "run.tokenize_ahead",
        "data.workers",
        "data.prefetch",
        # What is watched, saved and done afterwards, and when to give up.
        "data.max_bad_fraction",
        "run.stop_after",
        "run.log_every",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.nonfinite_limit",
        "run.allow_config_change",
        "run.evaluate",
        "run.stall_minutes",
        "run.tensorboard",
        "run.wandb",
    }
)
"""Fields that may differ between a run and its resumption without changing what is trained."""


def config_to_dict(config: PretrainConfig) -> dict[str, Any]:
    """``config`` as plain JSON values, in the order of its fields."""
    return _to_json(asdict(config))


def save_config(config: PretrainConfig, path: Path | str) -> None:
    """Writes ``config`` as JSON, in the order of the fields; the file appears whole or not at all.

    Raises:
        OSError: the file cannot be written; an older one stays as it was.
    """
    path = Path(path)
    content = {VERSION_KEY: __version__, **config_to_dict(config)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_config(path: Path | str) -> PretrainConfig:
    """Reads what :func:`save_config` wrote; ``path`` is the file or the run folder that holds it.

    A key that is left out takes the default of the dataclasses in ``config.py``; an unknown key
    and a value of the wrong type are refused.

    Raises:
        ValueError: not a configuration; names the key, what was expected and what came.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: expected a run folder or its config.json")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except ValueError as error:  # not UTF-8, not JSON, or a key twice
        raise ValueError(f"{path} is not a configuration in JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {_shown(content)}")
    content.pop(VERSION_KEY, None)
    try:
        return _read_struct(PretrainConfig, content, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def config_from_dict(content: dict[str, Any]) -> PretrainConfig:
    """The inverse of :func:`config_to_dict`; ValueError names a key that doesn't fit."""
    return _read_struct(PretrainConfig, content, "")


def diff_configs(before: PretrainConfig, after: PretrainConfig) -> list[str]:
    """What differs in what is trained, one line a field: ``optimizer.lr: 0.0015 -> 0.002``.

    Fields in :data:`WITHOUT_EFFECT` are passed over.
    """
    new = dict(_leaves(after))
    return [
        f"{name}: {value} -> {new[name]}"
        for name, value in _leaves(before)
        if name not in WITHOUT_EFFECT and new[name] != value
    ]


def _leaves(struct: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(struct):
        value = getattr(struct, field.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _to_json(value: Any) -> Any:
    match value:
        case dict():
            return {key: _to_json(item) for key, item in value.items()}
        case tuple():
            return [_to_json(item) for item in value]
        case Path():
            return str(value)
        case _:
            return value


def _read_struct(kind: type, content: dict[str, Any], prefix: str) -> Any:
    types = get_type_hints(kind)
    values = {}
    for key, item in content.items():
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"it has {', '.join(types)}"
            raise ValueError(f"unknown key {prefix}{key}: {hint}")
        values[key] = _read(types[key], item, prefix + key)
    return kind(**values)


def _read(kind: Any, item: Any, name: str) -> Any:
    """``item`` of a JSON file as a value of type ``kind``."""
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(item, dict):
            raise ValueError(f"{name} must be an object, got {_shown(item)}")
        return _read_struct(kind, item, f"{name}.")
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for option in arguments:
            try:
                return _read(option, item, name)
            except ValueError:
                continue
    elif origin is Literal:
        if item in arguments:
            return item
    elif origin is tuple:
        endless = len(arguments) == 2 and arguments[1] is Ellipsis
        if isinstance(item, list) and (endless or len(item) == len(arguments)):
            kinds = [arguments[0]] * len(item) if endless else arguments
            return tuple(
                _read(part, value, f"{name}[{place}]")
                for place, (part, value) in enumerate(zip(kinds, item, strict=True))
            )
    elif kind is NoneType:
        if item is None:
            return None
    elif kind is float:
        if isinstance(item, int | float) and not isinstance(item, bool):
            return float(item)
    elif kind is Path:
        if isinstance(item, str):
            return Path(item)
    elif type(item) is kind:  # int, str or bool; a bool is no int here
        return item
    raise ValueError(f"{name} must be {_described(kind)}, got {_shown(item)}")


def _described(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_described(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list of {_described(arguments[0])}"
        return f"a list of {len(arguments)} values"
    names = {int: "an integer", float: "a number", bool: "true or false", NoneType: "null"}
    return names.get(kind, "a string")


def _shown(item: Any) -> str:
    text = json.dumps(item)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, item in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} stands twice")
        content[key] = item
    return content
