"""The three layouts of BEiT weights, as one table of names; the official one is the pivot.

official: github.com/microsoft/unilm, beit/. timm: the same names, without mask token and
masked-image head, and a relative table in each block. hf: transformers' names on disk; queries,
keys and values apart. Shapes: D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastbeit.interop.files import Tensors, WeightsError

Layout = Literal["official", "timm", "hf"]
LAYOUTS: tuple[Layout, ...] = ("official", "timm", "hf")

TABLE = "relative_position_bias_table"
SHARED_TABLE = f"rel_pos_bias.{TABLE}"

# official name, its name in transformers' files; {i} is a block, {p} is weight or bias.
_HF_NAMES = (
    ("cls_token", "beit.embeddings.cls_token"),
    ("mask_token", "beit.embeddings.mask_token"),
    ("pos_embed", "beit.embeddings.position_embeddings"),
    ("patch_embed.proj.{p}", "beit.embeddings.patch_embeddings.projection.{p}"),
    (SHARED_TABLE, f"beit.encoder.relative_position_bias.{TABLE}"),
    (
        f"blocks.{{i}}.attn.{TABLE}",
        f"beit.encoder.layer.{{i}}.attention.attention.relative_position_bias.{TABLE}",
    ),
    ("blocks.{i}.attn.q_bias", "beit.encoder.layer.{i}.attention.attention.query.bias"),
    ("blocks.{i}.attn.v_bias", "beit.encoder.layer.{i}.attention.attention.value.bias"),
    ("blocks.{i}.attn.proj.{p}", "beit.encoder.layer.{i}.attention.output.dense.{p}"),
    ("blocks.{i}.norm1.{p}", "beit.encoder.layer.{i}.layernorm_before.{p}"),
    ("blocks.{i}.norm2.{p}", "beit.encoder.layer.{i}.layernorm_after.{p}"),
    ("blocks.{i}.mlp.fc1.{p}", "beit.encoder.layer.{i}.intermediate.dense.{p}"),
    ("blocks.{i}.mlp.fc2.{p}", "beit.encoder.layer.{i}.output.dense.{p}"),
    ("blocks.{i}.gamma_1", "beit.encoder.layer.{i}.lambda_1"),
    ("blocks.{i}.gamma_2", "beit.encoder.layer.{i}.lambda_2"),
    ("norm.{p}", "layernorm.{p}"),
    ("norm.{p}", "beit.layernorm.{p}"),
    ("lm_head.{p}", "lm_head.{p}"),
    ("fc_norm.{p}", "beit.pooler.layernorm.{p}"),
    ("head.{p}", "classifier.{p}"),
)
_HF_QKV = "beit.encoder.layer.{i}.attention.attention.{part}.weight"
_HF_PARTS = ("query", "key", "value")
# transformers 5 names its modules anew but writes files with the names above; a state dict pickled
# by hand has the new ones.
_HF_NEW_TO_DISK = (
    (r"\bbeit\.layers\.", "beit.encoder.layer."),
    (r"\bshared_position_bias\.", "encoder.relative_position_bias."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"(layer\.\d+)\.(relative_position_bias\.)", r"\1.attention.attention.\2"),
)


class Entry(NamedTuple):
    """A tensor under its official name, and the names it had in the file."""

    tensor: Tensor
    sources: tuple[str, ...]


def detect_layout(names: Iterable[str]) -> Layout | None:
    """hf or official by the names; timm's can't be told from official ones, nor need they be."""
    for name in names:
        if re.search(r"(^|\.)(encoder\.layer|layers)\.\d+\.", name):
            return "hf"
        if re.match(r"blocks\.\d+\.", name):
            return "official"
    return None


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(escaped.replace(r"\{p\}", "(?P<p>weight|bias)"))


def _fill(template: str, match: re.Match[str]) -> str:
    for name, value in match.groupdict().items():
        template = template.replace(f"{{{name}}}", value)
    return template


_FROM_HF = tuple((_pattern(hf), official) for official, hf in _HF_NAMES)
_TO_HF = tuple((_pattern(official), hf) for official, hf in _HF_NAMES)
_QKV_FROM_HF = re.compile(
    _pattern(_HF_QKV).pattern.replace(r"\{part\}", "(?P<part>query|key|value)")
)
_QKV_TO_HF = _pattern("blocks.{i}.attn.qkv.weight")


def harmless(name: str) -> bool:
    """Names that add nothing: indices that follow from the grid, and biases of keys.

    A key bias adds the same to every score of a query, so no softmax sees it.
    """
    return name.endswith(("relative_position_index", "attn.k_bias", ".key.bias", ".k_proj.bias"))


def to_official(tensors: Tensors, layout: Layout) -> dict[str, Entry]:
    """Entries by official name; names without a meaning in the layout are left out."""
    if layout == "hf":
        return _hf_to_official(tensors)
    entries: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        if harmless(name):
            continue
        if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.bias", name) and tensor.dim() == 1:
            # One packed bias, as fastbeit itself keeps it: the key third is without effect.
            q_bias, _, v_bias = tensor.chunk(3)
            stem = name.removesuffix("qkv.bias")
            entries[f"{stem}q_bias"] = Entry(q_bias, (name,))
            entries[f"{stem}v_bias"] = Entry(v_bias, (name,))
        else:
            entries[name] = Entry(tensor, (name,))
    return entries


def _hf_disk_name(name: str) -> str:
    if name.startswith(("embeddings.", "encoder.", "layers.", "pooler.", "shared_position_bias.")):
        name = f"beit.{name}"  # BeitModel saved without a head
    for pattern, disk in _HF_NEW_TO_DISK:
        name = re.sub(pattern, disk, name)
    return name


def _hf_to_official(tensors: Tensors) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        disk = _hf_disk_name(name)
        if match := _QKV_FROM_HF.fullmatch(disk):
            parts.setdefault(match["i"], {})[match["part"]] = (name, tensor)
            continue
        found = next(((p.fullmatch(disk), o) for p, o in _FROM_HF if p.fullmatch(disk)), None)
        if found is None or found[0] is None:
            continue
        official = _fill(found[1], found[0])
        if official in entries:
            raise WeightsError(
                f"{entries[official].sources[0]} and {name} both stand for {official}: the model "
                "has two last norms (use_mean_pooling=False beneath another), as no BEiT has"
            )
        entries[official] = Entry(tensor, (name,))
    for block, found_parts in parts.items():
        absent = [part for part in _HF_PARTS if part not in found_parts]
        if absent:
            raise WeightsError(f"layer {block} has no weight for {', '.join(absent)}")
        names, weights = zip(*(found_parts[part] for part in _HF_PARTS), strict=True)
        entries[f"blocks.{block}.attn.qkv.weight"] = Entry(torch.cat(weights), names)
    return entries


def from_official(state: Tensors, layout: Layout) -> tuple[Tensors, list[str]]:
    """(tensors as the layout names them, official names that it has no place for)."""
    if layout == "official":
        return dict(state), []
    state = {name: tensor for name, tensor in state.items() if not harmless(name)}
    if layout == "timm":
        return _official_to_timm(state)
    tensors: Tensors = {}
    for name, tensor in state.items():
        if match := _QKV_TO_HF.fullmatch(name):
            for part, weight in zip(_HF_PARTS, tensor.chunk(3), strict=True):
                tensors[_HF_QKV.format(i=match["i"], part=part)] = weight
            continue
        found = next((p.fullmatch(name), hf) for p, hf in _TO_HF if p.fullmatch(name))
        assert found[0] is not None
        tensors[_fill(found[1], found[0])] = tensor
    return tensors, []


def _official_to_timm(state: Tensors) -> tuple[Tensors, list[str]]:
    state = clone_shared_table(state)
    dropped = [name for name in state if name == "mask_token" or name.startswith("lm_head.")]
    return {name: tensor for name, tensor in state.items() if name not in dropped}, dropped


def clone_shared_table(state: Tensors) -> Tensors:
    """The shared relative table, if any, copied into every block."""
    state = dict(state)
    shared = state.pop(SHARED_TABLE, None)
    if shared is not None:
        for block in block_numbers(state):
            state[f"blocks.{block}.attn.{TABLE}"] = shared.clone()
    return state


def block_numbers(names: Iterable[str]) -> list[int]:
    """Numbers of the blocks that the names speak of, ascending."""
    found = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    return sorted({int(match[1]) for match in found if match})
