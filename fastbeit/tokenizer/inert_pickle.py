"""Reads tensors out of a file that torch.save wrote of whole modules, and runs nothing in it.

The pickle is read by ``inert_objects``; a tensor is only a record until the caller asks for its
numbers. Both layouts of torch.save are read: the zip archive (torch >= 1.6) and the older sequence
of pickles.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbeit.tokenizer.inert_objects import (
    InertObject,
    Reader,
    RefusedPickle,
    Storage,
    StorageType,
    TensorRecord,
)

__all__ = ["RefusedPickle", "SavedObject", "read_saved_object"]

PICKLE_LIMIT_BYTES = 64 << 20  # of the structure, tensors apart; the published files have 0.1 MB
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

NUMPY_DTYPES = {
    torch.float64: "<f8",
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.bfloat16: "<i2",  # NumPy has none: same width, reinterpreted below
    torch.int64: "<i8",
    torch.int32: "<i4",
}


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
        flat = torch.from_numpy(np.frombuffer(data, NUMPY_DTYPES[record.storage.dtype]).copy())
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
    return Reader(io.BytesIO(data), storages).load()


def _storage_of(pid: tuple) -> Storage:
    _, kind, key, _, count, *_ = pid
    if not isinstance(kind, StorageType) or not isinstance(key, str):
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
        return Reader(stream, storages).load()

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
