"""Sources: images as encoded bytes, by number.

``open_source`` finds out what it is given: a folder of images, a list file, one WebDataset tar or
many (by folder, glob or brace pattern), or the demo data that come with the package.
"""

from __future__ import annotations

import glob
import os
import re
from itertools import product
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastbeit.data.folder import FileSource, FolderContents, folder_source, list_source, scan_folder
from fastbeit.data.names import IMAGE_EXTENSIONS
from fastbeit.data.tar import TarSource

DEMO_FOLDER = Path(__file__).parent / "demo"
# What people call the parts of a data set; the first name is the one to ask for.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
_SPLIT_NAMES = frozenset(name for names in _SPLITS.values() for name in names)
_COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Source(Protocol):
    """Images by number: the only thing that loaders know about where data come from.

    A source never changes once it is open, can be pickled, and may be read from several threads and
    from forked or spawned processes.
    """

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class of each image, int64 ``[N]``; None without labels."""
        ...

    @property
    def classes(self) -> list[str] | None:
        """Class names by label; None when labels have no names."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digits of all names and sizes, in order: equal when a run may be resumed on it."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, /) -> bytes:
        """The encoded image. Raises OSError when it can't be read."""
        ...

    def name(self, index: int, /) -> str:
        """The path of the image, or the tar's path, "!", and the member's name."""
        ...


def open_source(spec: str | os.PathLike[str], *, split: str | None = None) -> Source:
    """Open the images at ``spec``.

    Args:
        spec: one of

            - a folder: read recursively, sorted, hidden files left out; the folders right under it
              are the classes. A folder that holds tars and no image files is read as their shards;
            - a ``.txt`` list: one path a line (relative to the list), optionally a tab and a label;
            - a ``.tar``, a glob (``"data/*.tar"``) or a brace pattern (``"t-{000..127}.tar"``);
            - ``"demo"``: the data in the package (write ``./demo`` for a folder of that name).
        split: for the demo "train" (also when None), "validation" or "test"; for a folder, the
            sub-folder of that name or the tars whose names start with it. None reads all.

    Raises:
        ValueError: nothing there, no image in it, or not clear what is meant. The message says what
            was looked for, what was found, and what to do.
    """
    text = os.fspath(spec)
    if text == "demo":
        return _open_demo(split or "train")
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        return _open_folder(path) if split is None else _open_split(path, split)
    if split is not None:
        raise ValueError(
            f"split={split!r} applies to 'demo' and to folders; {text} is not a folder"
        )
    if path.lower().endswith(_COMPRESSED_TAR):
        raise ValueError(
            f"{text} is compressed: images can be read at random only from an uncompressed tar. "
            "Decompress it first; images in it hardly grow"
        )
    if os.path.isfile(path):
        match os.path.splitext(path)[1].lower():
            case ".txt":
                return list_source(path)
            case ".tar":
                return TarSource([path])
            case extension:
                raise ValueError(
                    f"{text} ends in {extension or 'no extension'}: expected a folder, "
                    "a .txt list of paths, or a .tar"
                )
    if re.search(r"[*?\[{]", path):
        return TarSource(_expand(path))
    raise ValueError(
        f"{text} does not exist: expected a folder of images, a .txt list of paths, a .tar, "
        "a glob or brace pattern of tars, or 'demo'"
    )


def _open_demo(split: str) -> TarSource:
    if split not in _SPLITS:
        raise ValueError(f"the demo has the splits {', '.join(_SPLITS)}; got {split!r}")
    shards = sorted(map(str, DEMO_FOLDER.glob(f"{split}-*.tar")))
    if not shards:
        raise ValueError(
            f"the demo data are missing: no {split}-*.tar in {DEMO_FOLDER}. "
            "Install fastbeit again with its package data, or give a folder of images"
        )
    return TarSource(shards)


def _open_split(path: str, split: str) -> Source:
    names = _SPLITS.get(split, (split,))
    for name in names:
        if os.path.isdir(os.path.join(path, name)):
            return _open_folder(os.path.join(path, name))
    entries = sorted(entry for entry in os.listdir(path) if not entry.startswith("."))
    for name in names:
        shard = re.compile(rf"{re.escape(name)}([-_.].*)?\.tar")
        if shards := [os.path.join(path, entry) for entry in entries if shard.fullmatch(entry)]:
            return TarSource(shards)
    raise ValueError(
        f"no split {split!r} in {path}: looked for a sub-folder or tars called "
        f"{' or '.join(names)}; found {_some(entries)}"
    )


def _open_folder(path: str) -> Source:
    found = scan_folder(path)
    if found.images and found.tars:
        raise ValueError(
            f"{path} holds {len(found.images)} image files and {len(found.tars)} tars (the first: "
            f"{os.fsdecode(found.tars[0])}): name what you mean, a sub-folder, "
            "a .txt list, or the tars by a pattern such as 'DIR/*.tar'"
        )
    if found.tars:
        tars = [os.fsdecode(tar) for tar in found.tars]
        _refuse_mixed_splits(path, {re.split(r"[-_./]", tar)[0] for tar in tars})
        return TarSource([os.path.join(path, tar) for tar in tars])
    if not found.images:
        raise ValueError(_no_image(path, found))
    source = folder_source(path, found.images)
    _refuse_mixed_splits(path, set(source.classes or ()))
    return source


def _refuse_mixed_splits(path: str, parts: set[str]) -> None:
    """A folder of nothing but splits was not meant as a whole: test images would be trained on."""
    if len(parts) > 1 and parts <= _SPLIT_NAMES:
        raise ValueError(
            f"{path} holds the splits {', '.join(sorted(parts))}, which must not be mixed: name "
            f"one (split='train', a sub-folder such as {os.path.join(path, 'train')}, or a pattern)"
        )


def _no_image(path: str, found: FolderContents) -> str:
    others = [os.fsdecode(name) for name in found.others]
    advice = ""
    if any(name.lower().endswith(_COMPRESSED_TAR) for name in others):
        advice = ". Compressed tars can't be read at random: decompress them first"
    return (
        f"no image in {path}: looked recursively for {' '.join(IMAGE_EXTENSIONS)} and .tar, "
        f"hidden files left out; found {_some(others)}{advice}"
    )


def _some(names: list[str]) -> str:
    """A few of the names, and how many more."""
    if not names:
        return "nothing"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _expand(pattern: str) -> list[str]:
    """The tars that a pattern means: braces first, as in a shell, then globs."""
    paths: list[str] = []
    for part in _expand_braces(pattern):
        # A name without wildcards must exist; it may hold brackets, so it is not globbed.
        matches = [part] if os.path.isfile(part) else sorted(glob.glob(part))
        if not matches:
            raise ValueError(f"{pattern}: nothing matches {part}")
        paths += matches
    if unfit := [path for path in paths if not path.lower().endswith(".tar")]:
        raise ValueError(f"{pattern}: expected .tar files only, got {_some(unfit)}")
    return paths


def _expand_braces(pattern: str) -> list[str]:
    """``{a,b}`` and ``{00..17}``, any number of them, not nested."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            choices.append([piece])
        elif span := re.fullmatch(r"(\d+)\.\.(\d+)", piece):
            first, last = span.groups()
            if int(last) < int(first):
                raise ValueError(f"{pattern}: {{{piece}}} counts down; write the smaller first")
            width = len(first) if first.startswith("0") or len(first) == len(last) else 0
            choices.append([f"{k:0{width}d}" for k in range(int(first), int(last) + 1)])
        else:
            choices.append(piece.split(","))
    return ["".join(parts) for parts in product(*choices)]


__all__ = ["FileSource", "Source", "TarSource", "open_source"]
