"""``load_weights``: nothing half-loaded, every name accounted for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastbeit.interop.files import Tensors, WeightsError, read_tensors
from fastbeit.interop.layouts import (
    LAYOUTS,
    SHARED_TABLE,
    TABLE,
    Entry,
    Layout,
    block_numbers,
    detect_layout,
    harmless,
    to_official,
)
from fastbeit.model import BeitClassifier, BeitForMim
from fastbeit.model.resize import resize_pos_embed, resize_relative_table

Model = BeitForMim | BeitClassifier
Grid = tuple[int, int]

# What a checkpoint of another purpose legitimately lacks: absent together or not at all.
_MAY_LACK: dict[type, tuple[tuple[str, ...], ...]] = {
    BeitForMim: (("mask_token",), ("lm_head.",)),
    BeitClassifier: (("fc_norm.", "head."),),
}
# What belongs to the encoder. A name of these that finds no place means another architecture.
_ENCODER = ("blocks.", "patch_embed.", "rel_pos_bias.", "cls_token", "pos_embed")


@dataclass(frozen=True)
class LoadReport:
    """What became of every name.

    Attributes:
        path: the file.
        layout: official (timm's names are the same) or hf.
        used: names in the file that reached the model.
        unused: names in the file that did not (another purpose's head, indices).
        missing: official names that the file lacks; those parameters keep their values.
        resized: official names taken to the model's grid.
        copied: official names filled from one shared table, or the shared table from equal ones.
    """

    path: Path
    layout: Layout
    used: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    resized: tuple[str, ...]
    copied: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.layout}): {len(self.used)} names used"]
        for word in ("unused", "missing", "resized", "copied"):
            names = getattr(self, word)
            lines.append(f"  {word}: {len(names)}" + (f" ({', '.join(names)})" if names else ""))
        return "\n".join(lines)


def official_state(model: Model, state: Mapping[str, Tensor] | None = None) -> Tensors:
    """The model's parameters under official names; ``q_bias`` and ``v_bias`` are views.

    ``state`` stands in for ``model.state_dict()`` where the model is sharded.
    """
    official: Tensors = {}
    for name, tensor in (model.state_dict() if state is None else state).items():
        if name.endswith(".attn.qkv.bias"):
            q_bias, _, v_bias = tensor.chunk(3)
            official[name.replace("qkv.bias", "q_bias")] = q_bias
            official[name.replace("qkv.bias", "v_bias")] = v_bias
        else:
            official[name] = tensor
    return official


def load_weights(
    model: Model,
    path: str | Path,
    format: Layout | Literal["auto"] = "auto",
    *,
    grid: Grid | None = None,
    allow_missing: Iterable[str] = (),
) -> LoadReport:
    """Load a BEiT checkpoint of any layout into a model, or refuse it and leave the model alone.

    A masked-image checkpoint fits a classifier (which keeps its fresh head and ``fc_norm``) and the
    other way round, except for the last norm; a shared relative table is copied into every block of
    a model with per-block tables; position parameters are resized to the model's grid.

    Args:
        model: on any one device, in any floating dtype; not sharded yet.
        path: safetensors, ``.pth``/``.bin`` (bare or wrapped), or a transformers directory.
        format: ``auto`` tells by the names; any other refuses a file of another layout.
        grid: patches (down, across) of the checkpoint, needed where it is not a square's.
        allow_missing: beginnings of official names that may be missing or of another shape, such as
            ``"head"`` for another number of classes; those parameters keep their values.

    Returns:
        LoadReport, which lists what was used, unused, missing, resized and copied.

    Raises:
        WeightsError (a ValueError): unreadable or unsafe file, missing or misfitting names.
    """
    tensors, _ = read_tensors(path)
    path = Path(path)
    layout = detect_layout(tensors)
    if layout is None:
        raise WeightsError(
            f"{path} is not a BEiT checkpoint: no name like blocks.0... or encoder.layer.0..., but "
            f"{', '.join(list(tensors)[:4])}"
        )
    if format not in ("auto", *LAYOUTS):
        raise ValueError(f"format must be auto or one of {', '.join(LAYOUTS)}, got {format!r}")
    if format != "auto" and (format == "hf") != (layout == "hf"):
        raise WeightsError(f"{path} has {layout} names, but format={format!r} was asked for")
    try:
        entries = to_official(tensors, layout)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    wanted = official_state(model)
    copied = _match_tables(entries, wanted)
    resized, misfits = _fit_shapes(entries, wanted, grid, model.config.grid)
    excused = tuple(allow_missing)
    for name in [name for name in misfits if excused and name.startswith(excused)]:
        del misfits[name], entries[name]

    missing = [name for name in wanted if name not in entries]
    problems = list(misfits.values())
    problems += _missing_problems(model, missing, excused)
    spare = [name for name in entries if name not in wanted]
    problems += _spare_problems(spare, entries, wanted)
    if problems:
        shown = problems[:12] + ([f"and {len(problems) - 12} more"] if len(problems) > 12 else [])
        raise WeightsError(
            f"{path} does not fit this {type(model).__name__}; nothing was loaded:\n  "
            + "\n  ".join(shown)
        )
    with torch.no_grad():
        for name, parameter in wanted.items():  # views of the model's own memory
            if name in entries:
                parameter.copy_(entries[name].tensor)
    used = dict.fromkeys(s for name in wanted if name in entries for s in entries[name].sources)
    return LoadReport(
        path=path,
        layout=layout,
        used=tuple(used),
        unused=tuple(name for name in tensors if name not in used),
        missing=tuple(missing),
        resized=tuple(resized),
        copied=tuple(copied),
    )


def _match_tables(entries: dict[str, Entry], wanted: Tensors) -> list[str]:
    """Shared table → one for each block; equal tables → the shared one. Names so filled."""
    per_block = [name for name in entries if name.startswith("blocks.") and name.endswith(TABLE)]
    wanted_blocks = [name for name in wanted if name.startswith("blocks.") and name.endswith(TABLE)]
    if SHARED_TABLE in entries and wanted_blocks and not per_block:
        shared = entries.pop(SHARED_TABLE)
        entries.update({name: shared for name in wanted_blocks})
        return wanted_blocks
    if SHARED_TABLE in wanted and SHARED_TABLE not in entries and per_block:
        tables = [entries[name] for name in per_block]
        first = tables[0].tensor
        if all(torch.equal(first, other.tensor) for other in tables[1:]):
            for name in per_block:
                del entries[name]
            sources = tuple(source for table in tables for source in table.sources)
            entries[SHARED_TABLE] = Entry(first, sources)
            return [SHARED_TABLE]
    return []


def _square_grid(patches: int) -> Grid | None:
    side = math.isqrt(max(patches, 0))
    return (side, side) if side * side == patches and side else None


def _fit_shapes(
    entries: dict[str, Entry], wanted: Tensors, grid: Grid | None, target: Grid
) -> tuple[list[str], dict[str, str]]:
    """Resize positions in place; (names resized, what is wrong by name)."""
    resized: list[str] = []
    misfits: dict[str, str] = {}
    for name in [name for name in entries if name in wanted]:
        tensor, sources = entries[name]
        shape = tuple(wanted[name].shape)
        is_table = name.endswith(TABLE)
        source_grid = grid or (target if tuple(tensor.shape) == shape else None)
        if not tensor.is_floating_point():
            misfits[name] = f"{sources[0]} is {tensor.dtype}, not floating point"
            continue
        if (is_table or name == "pos_embed") and source_grid != target:
            if source_grid is None and is_table:
                side = _square_grid(tensor.shape[0] - 3)
                if side is not None and side[0] % 2:
                    source_grid = ((side[0] + 1) // 2, (side[1] + 1) // 2)
            elif source_grid is None and tensor.dim() == 3:
                source_grid = _square_grid(tensor.shape[1] - 1)
            if source_grid is None:
                misfits[name] = (
                    f"{sources[0]} {list(tensor.shape)} is not of a square grid: "
                    "say of which with grid=(down, across)"
                )
                continue
            resize = resize_relative_table if is_table else resize_pos_embed
            try:
                entries[name] = Entry(resize(tensor, source_grid, target), sources)
            except ValueError as error:
                misfits[name] = f"{sources[0]}: {error}"
                continue
            resized.append(name)
        if tuple(entries[name].tensor.shape) != shape:
            misfits[name] = (
                f"{sources[0]} is {list(tensor.shape)}, the model's {name} is {list(shape)}"
            )
    return resized, misfits


def _missing_problems(model: Model, missing: list[str], excused: tuple[str, ...]) -> list[str]:
    allowed: set[str] = set()
    names = official_state(model)
    for group in _MAY_LACK[kind_of(model)]:
        members = {name for name in names if name.startswith(group)}
        if members <= set(missing):
            allowed |= members
    found = [n for n in missing if n not in allowed and not (excused and n.startswith(excused))]
    return [
        f"{name} is missing (allow_missing can name it, and it keeps its present value)"
        for name in found
    ]


def kind_of(model: Model) -> type[Model]:
    """BeitForMim or BeitClassifier."""
    # Sharding swaps the class for one that inherits from it.
    return BeitForMim if isinstance(model, BeitForMim) else BeitClassifier


def _spare_problems(spare: list[str], entries: dict[str, Entry], wanted: Tensors) -> list[str]:
    theirs, ours = len(block_numbers(entries)), len(block_numbers(wanted))
    if theirs > ours:
        return [f"it has {theirs} blocks, the model {ours}"]
    hints = {
        "gamma_": "the model has no LayerScale (layer_scale=None)",
        TABLE: "the model has no such table (position)",
        "pos_embed": "the model has no absolute positions (position)",
    }
    problems = []
    for name in (name for name in spare if name.startswith(_ENCODER) and not harmless(name)):
        hint = next(
            (text for key, text in hints.items() if key in name), "the model has no such part"
        )
        problems.append(f"{entries[name].sources[0]} has no place: {hint}")
    return problems
