"""What a checkpoint folder holds, checked before it is read: it runs nothing and is undamaged."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fastbeit.training.distributed import World


def complete_checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-????????") if (p / "state.json").is_file())


class _IndexReader(pickle.Unpickler):
    """Reads a checkpoint's index, which is a pickle, without calling what it doesn't need."""

    _METADATA = "torch.distributed.checkpoint.metadata"
    _NEEDED = frozenset(
        {
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),  # its name in Python 3.13
            ("torch", "Size"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            (_METADATA, "BytesStorageMetadata"),
            (_METADATA, "ChunkStorageMetadata"),
            (_METADATA, "Metadata"),
            (_METADATA, "MetadataIndex"),
            (_METADATA, "StorageMeta"),
            (_METADATA, "TensorProperties"),
            (_METADATA, "TensorStorageMetadata"),
            (_METADATA, "_MEM_FORMAT_ENCODING"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._NEEDED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def check_index(path: Path) -> Any:
    """Refuse an index that would run code or name pickled objects once the library reads it."""
    try:
        with open(path, "rb") as file:
            index = _IndexReader(file).load()
        entries = index.state_dict_metadata
        foreign = [k for k, v in entries.items() if not isinstance(v, TensorStorageMetadata)]
    except Exception as error:
        raise ValueError(f"{path} is not the index of a checkpoint: {cause(error)}") from error
    if foreign:
        raise ValueError(f"{path} holds other things than tensors: {', '.join(foreign[:5])}")
    return index


def check_sums(folder: Path, index: Any, world: World) -> None:
    """Refuse tensors whose bytes are not those that were written, on every rank alike.

    Each tensor is a zip archive of its own in its rank's file; PyTorch writes its CRC-32 but never
    checks it. The ranks share the files out.
    """
    parts: dict[str, list[Any]] = {}
    for place in index.storage_data.values():
        parts.setdefault(place.relative_path, []).append(place)
    damage = None
    for name in sorted(parts)[world.rank :: world.size]:
        try:
            with open(folder / name, "rb") as file:
                for place in parts[name]:
                    file.seek(place.offset)
                    with zipfile.ZipFile(io.BytesIO(file.read(place.length))) as archive:
                        if archive.testzip() is not None:
                            raise zipfile.BadZipFile("the check sum of its bytes is wrong")
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            damage = f"{folder / name} is damaged ({cause(error)})"
            break
    found: list[str | None] = [None] * world.size
    dist.all_gather_object(found, damage, group=world.storage)
    if first := next(filter(None, found), None):
        others = [p.name for p in complete_checkpoints(folder.parent) if p != folder]
        raise ValueError(
            f"{first}; "
            + (
                f"write {others[-1]} into {folder.parent / 'latest'} to go on from there"
                if others
                else "start in another run folder"
            )
        )


def cause(error: BaseException) -> str:
    """The first line of the innermost reason: distributed checkpoint errors wrap each rank's."""
    failures = getattr(error, "failures", None)
    if failures:
        inner = next(iter(failures.values()))
        error = inner[0] if isinstance(inner, tuple) else inner
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
