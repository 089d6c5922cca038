"""``save_weights``: a model's weights as the official code, timm or transformers reads them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastbeit.interop.files import write_tensors, write_text
from fastbeit.interop.layouts import LAYOUTS, TABLE, Layout, from_official
from fastbeit.interop.weights import Model, kind_of, official_state
from fastbeit.model import BeitClassifier
from fastbeit.model.positions import relative_index

METADATA_KEY = "fastbeit"  # in a safetensors file's metadata: model class and config, as JSON


@dataclass(frozen=True)
class SaveReport:
    """What was written.

    Attributes:
        path: the file.
        layout: official, timm or hf.
        written: names in the file.
        dropped: official names that the layout has no place for.
    """

    path: Path
    layout: Layout
    written: tuple[str, ...]
    dropped: tuple[str, ...]


def save_weights(
    model: Model,
    path: str | Path,
    format: Layout = "official",
    *,
    state: Mapping[str, Tensor] | None = None,
    omit: Iterable[str] = (),
) -> SaveReport:
    """Write a model's weights in a layout that the official code, timm or transformers loads.

    Args:
        model: unsharded, or give ``state``.
        path: ``.safetensors``; or ``.pth``/``.bin`` for ``{"model": ...}``, as the official code
            reads it; for hf a directory too, which gets ``model.safetensors``. Beside an hf file
            goes a ``config.json``, so that ``from_pretrained(directory)`` reads both.
        format: timm has no place for the mask token and the masked-image head, and gets a relative
            table in each block.
        state: the full state dict of a sharded model, gathered by the caller.
        omit: official names to leave out.

    Returns:
        SaveReport: names written, and official names without a place in the layout.

    Raises:
        ValueError: unknown format or suffix; or hf for relative positions on a grid that is not
            square, which transformers computes wrongly.
    """
    if format not in LAYOUTS:
        raise ValueError(f"format must be one of {', '.join(LAYOUTS)}, got {format!r}")
    config = model.config
    if format == "hf" and config.grid[0] != config.grid[1] and "relative" in config.position:
        raise ValueError(
            f"transformers resizes the relative table of a {config.grid[0]}x{config.grid[1]} grid "
            "with height and width exchanged: no hf file would compute what this model does"
        )
    path = Path(path)
    if format == "hf" and not path.suffix:
        path = path / "model.safetensors"
    official = official_state(model, state)
    for name in set(omit):
        official.pop(name, None)
    if format == "official":
        # The official code keeps the index in its checkpoints.
        for name in [name for name in official if name.endswith(TABLE)]:
            official[name.replace(TABLE, "relative_position_index")] = relative_index(config.grid)
    tensors, dropped = from_official(official, format)
    about = {"model": kind_of(model).__name__, "config": dataclasses.asdict(config)}
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(about)})
    if format == "hf":
        write_text(path.with_name("config.json"), hf_config(model))
    return SaveReport(path=path, layout=format, written=tuple(tensors), dropped=tuple(dropped))


def hf_config(model: Model) -> dict[str, object]:
    """config.json for transformers; its default epsilon of LayerNorm is not BEiT's."""
    config = model.config
    classifies = isinstance(model, BeitClassifier)
    square = config.image_hw[0] == config.image_hw[1]
    content: dict[str, object] = {
        "architectures": [
            "BeitForImageClassification" if classifies else "BeitForMaskedImageModeling"
        ],
        "model_type": "beit",
        "image_size": config.image_hw[0] if square else list(config.image_hw),
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": config.drop_path,
        "layer_norm_eps": config.norm_eps,
        "layer_scale_init_value": config.layer_scale or 0.0,
        "use_mask_token": not classifies,
        "use_absolute_position_embeddings": config.position == "absolute",
        "use_relative_position_bias": config.position == "relative_per_block",
        "use_shared_relative_position_bias": config.position == "relative",
        # True leaves the last norm to the head: transformers' own masked-image head brings one.
        "use_mean_pooling": True,
        "vocab_size": config.vocab_size,
        "dtype": "float32",
    }
    if classifies:
        names = {str(number): f"LABEL_{number}" for number in range(config.num_classes)}
        content["id2label"] = names
        content["label2id"] = {name: int(number) for number, name in names.items()}
    return content
