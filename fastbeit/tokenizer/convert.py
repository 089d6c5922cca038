"""Turns the published DALL-E tokenizer into safetensors, without running anything in the pickles.

    python -m fastbeit.tokenizer.convert encoder.pkl [decoder.pkl] OUT.safetensors

``encoder.pkl`` and ``decoder.pkl`` (openai/DALL-E) are whole pickled modules; state dicts saved
with torch.save, with the same names, are taken too. Every tensor's name and shape is checked
against the network; the SHA-256 of the sources and of the result are printed and recorded.
Reads the file with ``inert_pickle``, which says how.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastbeit
from fastbeit.tokenizer.diagnose import OFFICIAL_DECODER, OFFICIAL_ENCODER, what_is
from fastbeit.tokenizer.dvae import Decoder, DvaeConfig, Encoder
from fastbeit.tokenizer.files import compare_shapes, save_tokenizer
from fastbeit.tokenizer.inert_pickle import (
    RefusedPickle,
    SavedObject,
    TensorRecord,
    read_saved_object,
)

Shapes = dict[str, tuple[int, ...]]


def convert(encoder_path: Path, decoder_path: Path | None, out: Path) -> dict[str, Any]:
    """Writes ``out`` from one or two files; returns what ``main`` prints.

    Returns:
        ``sha256`` of the tensors, ``file_sha256``, ``config``, ``parameters`` and ``sources``
        (name, bytes, sha256 of each file).

    Raises:
        ValueError: a file that is not what it should be, with what it seems to be.
    """
    if out.suffix != ".safetensors":
        raise ValueError(
            f"the last argument is the file to write and must end in .safetensors, got {out}"
        )
    encoder_tensors = _read(encoder_path, "encoder")
    config = _encoder_config(encoder_path, encoder_tensors)
    decoder_tensors = None if decoder_path is None else _read(decoder_path, "decoder")
    if decoder_path is not None and decoder_tensors is not None:
        config = _with_decoder(config, decoder_path, decoder_tensors)
    encoder = _fill(Encoder, config, encoder_path, encoder_tensors)
    decoder = None
    if decoder_path is not None and decoder_tensors is not None:
        decoder = _fill(Decoder, config, decoder_path, decoder_tensors)
    sources = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": _file_sha256(path)}
        for path in (encoder_path, decoder_path)
        if path is not None
    ]
    made_by = f"fastbeit.tokenizer.convert {fastbeit.__version__}"
    digest = save_tokenizer(out, encoder, decoder, origin={"made_by": made_by, "sources": sources})
    return {
        "sha256": digest,
        "file_sha256": _file_sha256(out),
        "config": config,
        "tensors": len(encoder.state_dict()) + (len(decoder.state_dict()) if decoder else 0),
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "sources": sources,
    }


def _read(path: Path, role: str) -> dict[str, Tensor]:
    """The tensors in ``path`` by the published names, without prefix."""
    if not path.is_file():
        raise ValueError(
            f"no file {path}: the {role} is published as "
            f"{OFFICIAL_ENCODER if role == 'encoder' else OFFICIAL_DECODER}"
        )
    found = what_is(path)
    try:
        saved = read_saved_object(path)
        records = _published_names(path, role, saved)
        return {name: saved.load(record).float() for name, record in records.items()}
    except RefusedPickle as error:
        if found.startswith(("a zip archive", "a pickle")):
            kept = "" if "names" in str(error) else " The download may have been cut off."
            raise ValueError(f"{path} is refused as the {role}: {error}.{kept}") from None
        raise ValueError(f"{path} is not the {role}'s weights: it is {found}.") from None


def _published_names(path: Path, role: str, saved: SavedObject) -> dict[str, TensorRecord]:
    records = saved.tensors()
    if not records:
        raise RefusedPickle(f"it holds a {saved.class_name} without any tensor")
    is_decoder = _looks_like_decoder(records)
    if is_decoder is not None and is_decoder != (role == "decoder"):
        other = "decoder" if is_decoder else "encoder"
        raise ValueError(
            f"{path} is the {other}, but was given as the {role}: the order is "
            "encoder.pkl [decoder.pkl] OUT.safetensors"
        )
    if is_decoder is None:
        raise ValueError(
            f"{path} holds a {saved.class_name} with {len(records)} tensors, none of them "
            f"blocks.input.w of DALL-E's {role} (first: {', '.join(list(records)[:3])})"
        )
    return records


def _looks_like_decoder(records: dict[str, TensorRecord]) -> bool | None:
    """By the first convolution: 1 x 1 from the codes, or wider from the pixels."""
    first = records.get("blocks.input.w")
    if first is None or len(first.shape) != 4:
        return None
    return first.shape[2] == 1 and first.shape[1] > 4


def _encoder_config(path: Path, tensors: dict[str, Tensor]) -> DvaeConfig:
    """The network that the tensors' shapes say they are of; they are checked against it later."""
    try:
        groups = _count(tensors, "blocks.group_", ".")
        blocks = _count(tensors, "blocks.group_1.block_", ".")
        widths = tuple(
            tensors[f"blocks.group_{g}.block_1.res_path.conv_4.w"].shape[0]
            for g in range(1, groups + 1)
        )
        return DvaeConfig(
            channels=tensors["blocks.input.w"].shape[1],
            codes=tensors["blocks.output.conv.w"].shape[0],
            widths=widths,
            blocks_per_group=blocks,
            kernel=tensors["blocks.input.w"].shape[2],
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} doesn't have an encoder's tensors: {error}") from None


def _with_decoder(config: DvaeConfig, path: Path, tensors: dict[str, Tensor]) -> DvaeConfig:
    width, codes = tensors["blocks.input.w"].shape[:2]
    if codes != config.codes:
        raise ValueError(
            f"{path} is the decoder of another tokenizer: it reads {codes} codes, the encoder "
            f"gives {config.codes}"
        )
    return DvaeConfig.from_dict({**config.to_dict(), "code_width": width})


def _count(tensors: dict[str, Tensor], prefix: str, end: str) -> int:
    numbers = {
        name.removeprefix(prefix).split(end)[0] for name in tensors if name.startswith(prefix)
    }
    if not numbers:
        raise KeyError(f"no {prefix}1")
    return len(numbers)


def _fill(network: type, config: DvaeConfig, path: Path, tensors: dict[str, Tensor]) -> Any:
    with torch.device("meta"):
        made = network(config)
    expected = {name: tuple(t.shape) for name, t in made.state_dict().items()}
    problems = compare_shapes(expected, {name: tuple(t.shape) for name, t in tensors.items()})
    if problems:
        raise ValueError(f"{path} doesn't fit the {network.__name__.lower()}: {problems}")
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} holds NaN or infinity; get the file again")
    made.load_state_dict(tensors, assign=True)
    return made


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Command line. Exit code 0, or 2 with a message that names the cause."""
    program = "python -m fastbeit.tokenizer.convert"
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder", type=Path, metavar="encoder.pkl")
    parser.add_argument("decoder", type=Path, metavar="decoder.pkl", nargs="?")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    options = parser.parse_args(arguments)
    try:
        done = convert(options.encoder, options.decoder, options.out)
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    for source in done["sources"]:
        print(f"{source['sha256']}  {source['name']} ({source['bytes']:,} bytes)")
    print(f"{done['file_sha256']}  {options.out}")
    kind = "DALL-E's published size" if done["config"] == DvaeConfig() else "another size"
    print(
        f"{done['tensors']} tensors, encoder {done['parameters']:,} parameters ({kind}), "
        f"{'with' if options.decoder else 'without'} decoder; content sha256 {done['sha256']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
