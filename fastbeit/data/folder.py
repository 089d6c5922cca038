"""Images as single files: a folder of them, or a list of their paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbeit.data.names import (
    NameTable,
    check_index,
    fingerprint,
    is_image,
    number_classes,
    read_labels,
)

# A stat on a network file system waits for the network: many at a time hide that.
_STAT_THREADS = 16
_PROBED_PATHS = 100


class FileSource:
    """Encoded images, one file each. Read-only, picklable, safe in threads and after a fork.

    Attributes:
        labels: int64 ``[N]``, or None without labels.
        classes: class names by label, or None when there are none.
    """

    def __init__(
        self,
        root: str,
        names: NameTable,
        labels: NDArray[np.int64] | None,
        classes: list[str] | None,
    ) -> None:
        self._root = root
        self._names = names
        self.labels = labels
        self.classes = classes
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"{len(self)} image files under {self._root}"

    def name(self, index: int) -> str:
        """The path of image ``index``."""
        return os.path.join(self._root, self._names[check_index(index, len(self))])

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError when the file can't be read."""
        with open(self.name(index), "rb") as file:
            return file.read()

    @property
    def fingerprint(self) -> str:
        """32 hex digits of all names (relative to the root) and sizes, in order.

        The sizes are looked up when this is first asked for, one stat a file on several threads.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._names, self._sizes())
        return self._fingerprint

    def _sizes(self) -> NDArray[np.int64]:
        starts = range(0, len(self), 4096)
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            return np.concatenate(list(pool.map(self._sizes_from, starts)))

    def _sizes_from(self, start: int) -> NDArray[np.int64]:
        stop = min(start + 4096, len(self))
        return np.array([_size(self.name(index)) for index in range(start, stop)], dtype=np.int64)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


@dataclass
class FolderContents:
    """What lies under a folder. Paths are relative to it, sorted."""

    images: list[bytes] = field(default_factory=list)
    tars: list[bytes] = field(default_factory=list)
    others: list[bytes] = field(default_factory=list)


def scan_folder(root: str) -> FolderContents:
    """List ``root`` recursively, in an order that depends only on the names.

    Hidden files and folders are left out. Symbolic links are followed, but each folder is entered
    once: under its real place if that lies in the tree, else at the first link (in sorted
    order) that leads to it. So loops end, and no image is listed twice.
    """
    found = FolderContents()
    base = os.fsencode(root)
    entered: set[tuple[int, int]] = set()
    links = [b""]
    while links:
        waiting: list[bytes] = []
        for link in links:
            for relative in _walk(base, link, entered, waiting):
                if is_image(relative):
                    found.images.append(relative)
                elif relative.lower().endswith(b".tar"):
                    found.tars.append(relative)
                else:
                    found.others.append(relative)
        links = sorted(waiting)
    for listed in (found.images, found.tars, found.others):
        listed.sort()
    return found


def _walk(
    base: bytes, start: bytes, entered: set[tuple[int, int]], links: list[bytes]
) -> Iterator[bytes]:
    """Files under ``start`` (relative to ``base``); linked folders are added to ``links``."""
    folders = [start]
    while folders:
        folder = folders.pop()
        place = os.path.join(base, folder)
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                relative = os.path.join(folder, entry.name)
                if entry.is_symlink():
                    # isdir and isfile say no to a broken link and to one that leads to itself.
                    target = os.path.join(base, relative)
                    if os.path.isdir(target):
                        links.append(relative)
                    elif os.path.isfile(target):
                        yield relative
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(relative)
                elif entry.is_file(follow_symlinks=False):
                    yield relative


def folder_source(root: str, images: list[bytes]) -> FileSource:
    """The source of ``images`` (relative to ``root``); classes are the folders right under it.

    An image right under the root belongs to no class, and then there are no labels.
    """
    labels, classes = number_classes([_first_folder(name) for name in images])
    return FileSource(root, NameTable.of(images), labels, classes)


def _first_folder(name: bytes) -> bytes:
    head, separator, _ = name.partition(b"/")
    return head if separator else b""


def list_source(path: str) -> FileSource:
    """The images named in a text file: one path a line, then optionally a tab and a label.

    Relative paths start at the list's folder. Labels are whole numbers or class names, on every
    line or on none. Empty lines are skipped.

    Raises:
        ValueError: no path in the list, labels on some lines only, or none of the first paths
            exists.
    """
    lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    names: list[bytes] = []
    labels: list[bytes] = []
    for line in lines:
        name, _, label = line.rstrip(b"\r").partition(b"\t")
        if name.strip():
            names.append(name)
            labels.append(label.strip())
    if not names:
        raise ValueError(f"no path in {path}: expected one image path a line, found none")
    labelled = sum(map(bool, labels))
    if 0 < labelled < len(labels):
        missing = names[labels.index(b"")]
        raise ValueError(
            f"{path} has a label on {labelled} of {len(labels)} lines; none for "
            f"{os.fsdecode(missing)}: give every line a label after a tab, or none"
        )
    root = os.path.dirname(os.path.abspath(path))
    probed = [os.path.join(root, os.fsdecode(name)) for name in names[:_PROBED_PATHS]]
    if not any(map(os.path.exists, probed)):
        raise ValueError(
            f"none of the first {len(probed)} paths in {path} exists (the first: {probed[0]}): "
            "relative paths start at the list's own folder"
        )
    numbers, classes = read_labels(labels)
    return FileSource(root, NameTable.of(names), numbers, classes)
