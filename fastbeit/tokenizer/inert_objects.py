"""What a pickle may name, and the inert objects it gets: an unpickler that runs nothing.

A pickle may call any function by name. Here the names on a short list get stand-ins, made afresh
for each file; any other name is refused before anything is built. So a class is never imported,
``__setstate__`` and ``forward`` never run, and a tensor is only a record (storage, shape, strides).
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
# Classes whose instances become inert objects.
_INERT_CLASSES = {
    ("dall_e.encoder", "Encoder"),
    ("dall_e.encoder", "EncoderBlock"),
    ("dall_e.decoder", "Decoder"),
    ("dall_e.decoder", "DecoderBlock"),
    ("dall_e.utils", "Conv2d"),
    ("torch.nn.modules.container", "Sequential"),
    ("torch.nn.modules.container", "ModuleDict"),
    ("torch.nn.modules.container", "ModuleList"),
    ("torch.nn.modules.linear", "Identity"),
    ("torch.nn.modules.activation", "ReLU"),
    ("torch.nn.modules.pooling", "MaxPool2d"),
    ("torch.nn.modules.upsampling", "Upsample"),
    ("functools", "partial"),
}
# Callables whose results nobody needs: they give None.
_INERT_VALUES = {
    ("torch", "device"),
    ("torch", "Size"),
    ("builtins", "set"),
}
# torch.save writes protocol 2, which calls modules by their old names.
_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class RefusedPickle(ValueError):
    """The file names something that is not on the list, or is not what it claims to be."""


@dataclass(frozen=True)
class Storage:
    """Numbers in the file: ``count`` of ``dtype`` under ``key``."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor's place in a storage; ``shape`` is checked by the caller before any byte is read."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class InertObject:
    """Stands for an instance of an allowed class; keeps the state it is given, does nothing."""

    class_name = ""

    state: dict[str, Any]

    def __new__(cls, *arguments: Any, **named: Any) -> InertObject:
        made = object.__new__(cls)
        made.state = {}
        return made

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass


class InertDict(dict):
    """Stands for an OrderedDict."""


class Reader(pickle._Unpickler):  # pure Python: a memo index can't make it reserve gigabytes
    def __init__(self, data: io.BytesIO, storages: Callable[[tuple], Storage]) -> None:
        super().__init__(data, encoding="utf-8")
        self._storages = storages
        self._stand_ins: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        module = _PYTHON_2_MODULES.get(module, module)
        key = (module, name)
        if key not in self._stand_ins:
            self._stand_ins[key] = self._make(module, name)
        return self._stand_ins[key]

    def get_extension(self, code: int) -> None:
        raise RefusedPickle(f"it uses pickle extension {code}, which stands for an unknown name")

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "module":
            return pid[1]  # the older layout wraps classes to carry their source text: not read
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise RefusedPickle("it refers to something outside that is no tensor storage")
        return self._storages(pid)

    def load_build(self) -> None:
        """Takes the state of an inert instance; never calls or changes anything else."""
        state = self.stack.pop()  # type: ignore[attr-defined]
        target = self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(target, InertObject):
            if isinstance(state, tuple) and len(state) == 2:
                state = state[0]  # (dict, slots)
            target.state = state if isinstance(state, dict) else {}
        elif not isinstance(target, InertDict):  # attributes of a dict are of no interest
            raise RefusedPickle("it gives a state to something that is no module")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
    }

    def _make(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in _INERT_CLASSES:
            return type(name, (InertObject,), {"class_name": f"{module}.{name}"})
        if key in _INERT_VALUES:
            return lambda *arguments: None
        if key == ("collections", "OrderedDict"):
            return type("OrderedDict", (InertDict,), {})
        if key == ("torch._utils", "_rebuild_tensor_v2"):
            return _record_tensor
        if key == ("torch._utils", "_rebuild_parameter"):
            return _record_parameter
        if module == "torch" and name in STORAGE_DTYPES:
            return StorageType(STORAGE_DTYPES[name])
        raise RefusedPickle(
            f"it names {module}.{name}, which no weights of this tokenizer need; nothing was run"
        )


@dataclass(frozen=True)
class StorageType:
    dtype: torch.dtype


def _record_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRecord:
    counts = [offset, *shape, *strides]
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise RefusedPickle("a tensor in it has no storage or no valid shape")
    if any(type(count) is not int or count < 0 for count in counts):
        raise RefusedPickle(f"a tensor in it has an impossible shape {shape} or strides {strides}")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.count or (math.prod(shape) and last >= storage.count):
        raise RefusedPickle(
            f"a tensor of shape {tuple(shape)} in it reaches beyond its storage of "
            f"{storage.count} numbers"
        )
    return TensorRecord(storage, offset, tuple(shape), tuple(strides))


def _record_parameter(data: Any, *rest: Any) -> TensorRecord:
    if not isinstance(data, TensorRecord):
        raise RefusedPickle("a parameter in it holds no tensor")
    return data
