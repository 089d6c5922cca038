"""Reads tensors out of a file that torch.save wrote of whole modules, and runs nothing in it.

A pickle may call any function by name. Here the names on a short list get inert stand-ins, made
afresh for each file; any other name is refused before anything is built. So a class is never
imported, ``__setstate__`` and ``forward`` never run, and a tensor is only a record (storage, shape,
strides) until the caller asks for its numbers.

Both layouts of torch.save are read: the zip archive (torch >= 1.6) and the older sequence of
pickles.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

PICKLE_LIMIT_BYTES = 64 << 20  # of the structure, tensors apart; the published files have 0.1 MB
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
_NUMPY_DTYPES = {
    torch.float64: "<f8",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.bfloat16: "<i2",  # NumPy has none: same width, reinterpreted below
    torch.int64: "<i8",
    torch.int32: "<i4",
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


class _Reader(pickle._Unpickler):  # pure Python: a memo index can't make it reserve gigabytes
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
        if module == "torch" and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        raise RefusedPickle(
            f"it names {module}.{name}, which no weights of this tokenizer need; nothing was run"
        )


@dataclass(frozen=True)
class _StorageType:
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


@dataclass(frozen=True)
class SavedObject:
    """What a file holds: the object (inert), and how to read a tensor's numbers."""

    root: Any
    read_storage: Callable[[Storage], bytes]

    @property
    def class_name(self) -> str:
        """The pickled class ("dall_e.encoder.Encoder"), or "dict", or another type's name."""
        if isinstance(self.root, InertObject):
            return self.root.class_name
        return "dict" if isinstance(self.root, dict) else type(self.root).__name__

    def tensors(self) -> dict[str, TensorRecord]:
        """Tensors by dotted name, of a module's parameters and buffers or of a state dict."""
        if isinstance(self.root, InertObject):
            return dict(_walk(self.root, "", ()))
        if isinstance(self.root, dict):
            return {
                name: value
                for name, value in self.root.items()
                if isinstance(name, str) and isinstance(value, TensorRecord)
            }
        return {}

    def load(self, record: TensorRecord) -> Tensor:
        """The numbers of a tensor, in its dtype, contiguous. RefusedPickle if they aren't there."""
        try:
            data = self.read_storage(record.storage)
        except (
            OSError,
            RuntimeError,
            NotImplementedError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise RefusedPickle(f"storage {record.storage.key} can't be read: {error}") from None
        flat = torch.from_numpy(np.frombuffer(data, _NUMPY_DTYPES[record.storage.dtype]).copy())
        if record.storage.dtype == torch.bfloat16:
            flat = flat.view(torch.bfloat16)
        return flat.as_strided(record.shape, record.strides, record.offset).clone(
            memory_format=torch.contiguous_format
        )


def _walk(
    module: InertObject, prefix: str, above: tuple[int, ...]
) -> Iterator[tuple[str, TensorRecord]]:
    if id(module) in above or len(above) > 32:
        raise RefusedPickle("a module in it contains itself")
    for part in ("_parameters", "_buffers"):
        values = module.state.get(part)
        for name, value in (values if isinstance(values, dict) else {}).items():
            if isinstance(value, TensorRecord):
                yield f"{prefix}{name}", value
    children = module.state.get("_modules")
    for name, child in (children if isinstance(children, dict) else {}).items():
        if isinstance(child, InertObject):
            yield from _walk(child, f"{prefix}{name}.", (*above, id(module)))


def read_saved_object(path: Path) -> SavedObject:
    """Opens a file of torch.save.

    Raises:
        RefusedPickle: it names something not allowed, or is malformed. Nothing in it has run.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        return _read_legacy(path)
    except RefusedPickle:
        raise
    # A hostile or cut-off pickle can fail anywhere in the reader; every way is a refusal.
    except (Exception, RecursionError) as error:
        raise RefusedPickle(
            f"it can't be read as torch.save's output ({type(error).__name__}: {error})"
        ) from None


def _unpickle(data: bytes, storages: Callable[[tuple], Storage]) -> Any:
    return _Reader(io.BytesIO(data), storages).load()


def _storage_of(pid: tuple) -> Storage:
    _, kind, key, _, count, *_ = pid
    if not isinstance(kind, _StorageType) or not isinstance(key, str):
        raise RefusedPickle("a storage in it has an unknown type")
    if type(count) is not int or count < 0:
        raise RefusedPickle(f"a storage in it claims {count!r} numbers")
    return Storage(key, kind.dtype, count)


def _read_zip(path: Path) -> SavedObject:
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.split("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise RefusedPickle("a zip archive without the data.pkl that torch.save writes")
        root_name = pickles[0].removesuffix("data.pkl")
        if entries[pickles[0]].file_size > PICKLE_LIMIT_BYTES:
            raise RefusedPickle(f"its structure alone claims {entries[pickles[0]].file_size} bytes")
        order = entries.get(f"{root_name}byteorder")
        if order is not None and archive.read(order)[:8] != b"little":
            raise RefusedPickle("it was written on a big-endian machine")
        root = _unpickle(archive.read(pickles[0]), _storage_of)

    def read_storage(storage: Storage) -> bytes:
        name = f"{root_name}data/{storage.key}"
        expected = storage.count * storage.dtype.itemsize
        if name not in entries or entries[name].file_size != expected:
            found = f"{entries[name].file_size}" if name in entries else "none"
            raise RefusedPickle(f"storage {storage.key} should have {expected} bytes, has {found}")
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)

    return SavedObject(root, read_storage)


def _read_legacy(path: Path) -> SavedObject:
    """Magic number, protocol, system facts, object, storage keys; then (count, numbers) each."""
    data = path.read_bytes()
    stream = io.BytesIO(data)
    known: dict[str, Storage] = {}

    def storages(pid: tuple) -> Storage:
        storage = _storage_of(pid)
        if len(pid) > 5 and pid[5] is not None:
            raise RefusedPickle("a storage in it is a view of another, as torch 0.3 wrote them")
        return known.setdefault(storage.key, storage)

    def load_next() -> Any:
        return _Reader(stream, storages).load()

    if load_next() != _LEGACY_MAGIC or load_next() != _LEGACY_PROTOCOL:
        raise RefusedPickle("a pickle, but not one that torch.save wrote")
    facts = load_next()
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise RefusedPickle("it was written on a big-endian machine")
    root = load_next()
    keys = load_next()
    if not isinstance(keys, list) or set(keys) != set(known):
        raise RefusedPickle("its list of storages doesn't fit its tensors")
    places: dict[str, tuple[int, int]] = {}
    position = stream.tell()
    for key in keys:
        storage = known[key]
        (count,) = struct.unpack_from("<q", data, position)
        size = storage.count * storage.dtype.itemsize
        if count != storage.count or position + 8 + size > len(data):
            raise RefusedPickle(f"storage {key} should have {storage.count} numbers: cut off?")
        places[key] = (position + 8, size)
        position += 8 + size

    def read_storage(storage: Storage) -> bytes:
        start, size = places[storage.key]
        return data[start : start + size]

    return SavedObject(root, read_storage)
