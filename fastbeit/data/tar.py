"""Images inside WebDataset tars: one shard or many, read in place, at random, nothing extracted."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbeit.data.names import (
    IMAGE_EXTENSIONS,
    NameTable,
    check_index,
    fingerprint,
    number_classes,
    read_labels,
)
from fastbeit.data.tar_index import DamagedTar, TarIndex, index_tar

log = logging.getLogger(__name__)

# The walk waits for the disk or the network; more threads than this only queue there.
_INDEX_THREADS = 8
# Processes may usually open 1024 files. Shards beyond these are opened for each read.
_MAX_OPEN_SHARDS = 256


class TarSource:
    """Encoded images in tars, by number. Read-only, picklable, safe in threads and after a fork.

    Labels come from ``.cls`` members with the image's key when every image has one (whole numbers,
    or class names); else from the folder that holds the member (the last part of its path) when
    every image lies in one; else there are none.

    Args:
        paths: the shards, in the order wanted.

    Attributes:
        labels: int64 ``[N]``, or None without labels.
        classes: class names by label, or None when there are none.
        skipped: truncated, damaged or unreadable shards, each as "path: reason".
        ignored: for each reason, how many members were left out and the first one's name.

    Raises:
        ValueError: no shard is readable, no image is in any, or one is compressed.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        shards: list[str] = []
        indices: list[TarIndex] = []
        self.skipped: tuple[str, ...] = ()
        self.ignored: dict[str, tuple[int, str]] = {}
        with ThreadPoolExecutor(_INDEX_THREADS) as pool:
            for path, result in zip(paths, pool.map(_try_index, paths), strict=True):
                if isinstance(result, str):
                    self.skipped += (f"{path}: {result}",)
                    log.warning("skipped %s: %s", path, result)
                else:
                    shards.append(path)
                    indices.append(result)
        for path, index in zip(shards, indices, strict=True):
            for reason, (count, first) in index.ignored.items():
                before, first_before = self.ignored.get(reason, (0, f"{path}!{first}"))
                self.ignored[reason] = (before + count, first_before)
        self._names = NameTable.joined(index.names for index in indices)
        if not len(self._names):
            raise ValueError(self._nothing_found(paths, shards))
        counts = [len(index.names) for index in indices]
        self._paths = [os.path.abspath(path) for path in shards]
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self._offset = np.concatenate([index.offset for index in indices])
        self._size = np.concatenate([index.size for index in indices])
        self.labels, self.classes = self._find_labels(indices)
        shard_names = [os.fsencode(os.path.basename(path)) for path in shards]
        self.fingerprint = fingerprint(self._names, self._size, *shard_names)
        self._descriptors: dict[int, int] = {}

    def _nothing_found(self, paths: Sequence[str], shards: list[str]) -> str:
        if not shards:
            listed = "; ".join(self.skipped[:5]) or "none was given"
            return f"no readable tar among {len(paths)}: {listed}"
        found = ", ".join(f"{count} {reason}" for reason, (count, _) in self.ignored.items())
        return (
            f"no image in {len(shards)} tar(s), the first {shards[0]}: looked for members ending "
            f"in {' '.join(IMAGE_EXTENSIONS)}; found {found or 'no member at all'}"
        )

    def _find_labels(
        self, indices: list[TarIndex]
    ) -> tuple[NDArray[np.int64] | None, list[str] | None]:
        texts = NameTable.joined(index.label_texts for index in indices)
        if np.diff(texts.offsets).all():
            return read_labels([texts.raw(i) for i in range(len(texts))])
        names = map(self._names.raw, range(len(self)))
        return number_classes([name.rpartition(b"/")[0].rpartition(b"/")[2] for name in names])

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"{len(self)} images in {len(self._paths)} tar(s), the first {self._paths[0]}"

    def name(self, index: int) -> str:
        """The tar's path, "!", and the member's name."""
        index = check_index(index, len(self))
        return f"{self._paths[self._shard[index]]}!{self._names[index]}"

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError when the tar can't be read or has become shorter."""
        index = check_index(index, len(self))
        shard, size = int(self._shard[index]), int(self._size[index])
        offset = int(self._offset[index])
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            data = os.pread(descriptor, size, offset)
        elif len(self._descriptors) < _MAX_OPEN_SHARDS:
            data = os.pread(self._open(shard), size, offset)
        else:
            with open(self._paths[shard], "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise OSError(
                f"{self.name(index)}: expected {size} bytes at {offset}, got {len(data)}: "
                "the tar has changed since it was indexed"
            )
        return data

    def _open(self, shard: int) -> int:
        # No lock, which a fork could copy while it is held: of two threads that open the same
        # shard at once, the later one closes its own.
        opened = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        kept = self._descriptors.setdefault(shard, opened)
        if kept != opened:
            os.close(opened)
        return kept

    def close(self) -> None:
        """Close the open shards, when no thread is reading. Reading opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}


def _try_index(path: str) -> TarIndex | str:
    try:
        return index_tar(path)
    except (DamagedTar, OSError) as error:
        return str(error)
