"""The architecture that a weight file holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fastbeit.interop.files import Tensors, WeightsError, read_tensors
from fastbeit.interop.layouts import (
    SHARED_TABLE,
    TABLE,
    Entry,
    block_numbers,
    detect_layout,
    to_official,
)
from fastbeit.interop.saving import METADATA_KEY
from fastbeit.interop.weights import Model
from fastbeit.model import BeitClassifier, BeitConfig, BeitForMim


def build_model_for(path: str | Path, *, heads: int | None = None) -> Model:
    """A model of the architecture that a weight file holds, with start values of its own.

    fastbeit's own files say their architecture, transformers' directories most of it. Elsewhere it
    follows from the shapes: heads from a relative table, else 64 features a head as in every
    published BEiT; a square image.

    Raises:
        WeightsError: the file can't be read, or its shapes leave the architecture open.
    """
    tensors, metadata = read_tensors(path)
    if METADATA_KEY in metadata:
        about = json.loads(metadata[METADATA_KEY])
        fields = about["config"]
        if isinstance(fields["image_size"], list):
            fields["image_size"] = tuple(fields["image_size"])
        kind = BeitClassifier if about["model"] == "BeitClassifier" else BeitForMim
        return kind(BeitConfig(**fields))
    layout = detect_layout(tensors)
    if layout is None:
        raise WeightsError(f"{path} is not a BEiT checkpoint: {', '.join(list(tensors)[:4])}")
    entries = to_official(tensors, layout)
    beside = _hf_config_beside(Path(path)) if layout == "hf" else {}
    try:
        config = _config_of(entries, beside, heads)
    except KeyError as error:
        raise WeightsError(f"{path} lacks {error.args[0]}: the architecture stays open") from None
    classifies = any(name.startswith(("head.", "fc_norm.")) for name in entries)
    return BeitClassifier(config) if classifies else BeitForMim(config)


def _hf_config_beside(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _config_of(entries: dict[str, Entry], beside: dict[str, Any], heads: int | None) -> BeitConfig:
    state: Tensors = {name: entry.tensor for name, entry in entries.items()}
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    block_table = next((t for n, t in state.items() if n.endswith(f"attn.{TABLE}")), None)
    table = state.get(SHARED_TABLE, block_table)
    if SHARED_TABLE in state:
        position = "relative"
    elif block_table is not None:
        position = "relative_per_block"
    else:
        position = "absolute" if "pos_embed" in state else "none"
    if "image_size" in beside:
        size = beside["image_size"]
        image_size = size if isinstance(size, int) else (int(size[0]), int(size[1]))
    elif table is not None:
        side = math.isqrt(table.shape[0] - 3)
        _check_square(side * side == table.shape[0] - 3 and side % 2 == 1, "relative table")
        image_size = (side + 1) // 2 * patch
    elif "pos_embed" in state:
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        _check_square(side * side == state["pos_embed"].shape[1] - 1, "pos_embed")
        image_size = side * patch
    else:
        image_size = 224 // patch * patch
    if heads is None:
        heads = table.shape[1] if table is not None else beside.get("num_attention_heads")
    return BeitConfig(
        image_size=image_size,
        patch_size=patch,
        in_channels=channels,
        width=width,
        depth=len(block_numbers(state)),
        heads=heads if heads is not None else max(width // 64, 1),
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        position=position,
        layer_scale=0.1 if "blocks.0.gamma_1" in state else None,
        vocab_size=state["lm_head.weight"].shape[0] if "lm_head.weight" in state else 8192,
        num_classes=state["head.weight"].shape[0] if "head.weight" in state else 1000,
    )


def _check_square(fits: bool, what: str) -> None:
    if not fits:
        raise WeightsError(
            f"the {what} is not of a square grid: build the model yourself, load with "
            "load_weights(..., grid=...) and save with save_weights"
        )
