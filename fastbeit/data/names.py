"""What every source shares: which names are images, and how a million names are kept and compared.

A list of a million ``str`` takes about 100 MB and seconds to pickle into every worker. Here the
names are one ``bytes`` object and an array of offsets: 45 MB for the 1.28 million of ImageNet, and
pickled at memory speed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_EXTENSIONS_BYTES = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)


def is_image(name: bytes) -> bool:
    """Whether the extension is that of an image, in upper or lower case."""
    return name.lower().endswith(_EXTENSIONS_BYTES)


class NameTable:
    """An immutable list of names, compact in memory and quick to pickle.

    Names are kept as the file system's bytes, so that undecodable ones survive; ``table[i]`` is the
    ``str`` that ``open`` takes.
    """

    __slots__ = ("blob", "offsets")

    def __init__(self, blob: bytes, offsets: NDArray[np.int64]) -> None:
        self.blob = blob
        self.offsets = offsets

    @classmethod
    def of(cls, names: Iterable[bytes]) -> NameTable:
        """The table of ``names``, in their order."""
        listed = list(names)
        offsets = np.zeros(len(listed) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, listed), np.int64, len(listed)), out=offsets[1:])
        return cls(b"".join(listed), offsets)

    @classmethod
    def joined(cls, tables: Iterable[NameTable]) -> NameTable:
        """All names of all tables, in order."""
        listed = list(tables)
        lengths = [np.diff(table.offsets) for table in listed]
        offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
        return cls(b"".join(table.blob for table in listed), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.raw(index))

    def raw(self, index: int) -> bytes:
        """Name ``index`` as bytes."""
        return self.blob[self.offsets[index] : self.offsets[index + 1]]

    def __reduce__(self) -> tuple[type[NameTable], tuple[bytes, NDArray[np.int64]]]:
        return NameTable, (self.blob, self.offsets)


def fingerprint(names: NameTable, sizes: NDArray[np.int64], *extra: bytes) -> str:
    """32 hex digits that change when a name, a size, their number or their order changes."""
    digest = blake2b(digest_size=16)
    for part in (names.blob, names.offsets.astype("<i8").tobytes(), sizes.astype("<i8").tobytes()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    for part in extra:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def check_index(index: int, length: int) -> int:
    """``index`` if it lies in [0, length), else IndexError."""
    if not 0 <= index < length:
        raise IndexError(f"sample {index} does not exist: the source holds {length}")
    return int(index)


def number_classes(names: list[bytes]) -> tuple[NDArray[np.int64] | None, list[str] | None]:
    """Labels and class names from one class name a sample, numbered in sorted order.

    An empty name among them means that some samples have no class: then there are no labels.
    """
    classes = sorted(set(names))
    if not classes or classes[0] == b"":
        return None, None
    number = {name: label for label, name in enumerate(classes)}
    labels = np.fromiter(map(number.__getitem__, names), np.int64, len(names))
    return labels, [os.fsdecode(name) for name in classes]


def read_labels(texts: list[bytes]) -> tuple[NDArray[np.int64] | None, list[str] | None]:
    """Labels from one written label a sample: whole numbers as they are, else class names."""
    if texts and all(text.isdigit() for text in texts):
        return np.fromiter(map(int, texts), np.int64, len(texts)), None
    return number_classes(texts)
