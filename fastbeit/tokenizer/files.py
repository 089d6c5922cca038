"""Tokenizer files: safetensors with a config, a content hash and an origin in the metadata.

Keys are ``encoder.blocks...`` and ``decoder.blocks...`` (the decoder may be absent). Metadata:
``format`` = "fastbeit.tokenizer", ``config`` (JSON of DvaeConfig), ``sha256`` of the tensors'
content, ``origin`` (JSON: which files or which command made it).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastbeit.tokenizer.diagnose import HOW_TO_GET, what_is
from fastbeit.tokenizer.dvae import Decoder, DvaeConfig, Encoder
from fastbeit.tokenizer.tokenizer import Tokenizer
from fastbeit_kernels import Impl

FORMAT = "fastbeit.tokenizer"
DEMO_PATH = Path(__file__).parent / "demo.safetensors"
DALL_E = DvaeConfig()
ENVIRONMENT_VARIABLE = "FASTBEIT_TOKENIZER"


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> Tokenizer:
    """A frozen tokenizer, its weights cast once to ``dtype``, channels-last, on ``device``.

    Args:
        name_or_path: "demo" (shipped: 28 px grey images, 256 codes), "dall-e" (the published one,
            converted by you: found at $FASTBEIT_TOKENIZER, else in the cache folder), or the path
            of a file that ``fastbeit.tokenizer.convert`` or ``.train`` wrote.
        impl: kernels of this instance's ``encode``, as ``Tokenizer`` has it; ``describe`` tells.

    Raises:
        ValueError: no such file (with what to do), or a file that is not a whole tokenizer.
    """
    if name_or_path == "demo":
        path = DEMO_PATH
    elif name_or_path == "dall-e":
        path = _find_dall_e()
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ValueError(
                f"no tokenizer at {path}: expected 'dall-e', 'demo' or the path of a file written "
                "by python -m fastbeit.tokenizer.convert or .train"
            )
    tokenizer = read_tokenizer(path, impl=impl)
    if name_or_path == "dall-e" and tokenizer.config != DALL_E:
        raise ValueError(
            f"{path} is a tokenizer, but not DALL-E's ({tokenizer.vocab_size} codes, "
            f"stride {tokenizer.stride}): ask for it by its path instead of by 'dall-e'"
        )
    return tokenizer.to(device=device, dtype=dtype)


def cache_path() -> Path:
    """Where "dall-e" is looked for when $FASTBEIT_TOKENIZER is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastbeit" / "dall_e.safetensors"


def _find_dall_e() -> Path:
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise ValueError(
                f"${ENVIRONMENT_VARIABLE} names {path}, which is no file.\n"
                + HOW_TO_GET.format(destination=path)
            )
        return path
    path = cache_path()
    if not path.is_file():
        raise ValueError(
            f"the DALL-E tokenizer is not at {path}, and ${ENVIRONMENT_VARIABLE} is not set.\n"
            + HOW_TO_GET.format(destination=path)
        )
    return path


def read_tokenizer(path: Path, *, impl: Impl = "auto") -> Tokenizer:
    """The tokenizer in a file of this module's format, float32 on the CPU. ValueError if not so."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        found = what_is(path)
        raise ValueError(
            f"{path} is no tokenizer file: expected safetensors, found {found} ({error}). A .pkl "
            "of the published tokenizer goes through python -m fastbeit.tokenizer.convert first."
        ) from None
    if metadata.get("format") != FORMAT or not {"config", "sha256"} <= set(metadata):
        raise ValueError(
            f"{path} is safetensors, but no tokenizer file: its metadata lacks "
            f"format = {FORMAT!r} with config and sha256 (found {sorted(metadata)})"
        )
    digest = tensors_sha256(tensors)
    if digest != metadata["sha256"]:
        raise ValueError(
            f"{path} is damaged: its tensors' sha256 is {digest}, its metadata says "
            f"{metadata['sha256']}; get or make the file again"
        )
    try:
        config = DvaeConfig.from_dict(json.loads(metadata["config"]))
        origin = json.loads(metadata.get("origin", "{}"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: unreadable tokenizer settings: {error}") from None
    has_decoder = any(key.startswith("decoder.") for key in tensors)
    with torch.device("meta"):
        encoder, decoder = Encoder(config), Decoder(config) if has_decoder else None
    expected = network_shapes(encoder, decoder)
    problems = compare_shapes(expected, {key: tuple(t.shape) for key, t in tensors.items()})
    if problems:
        raise ValueError(f"{path} does not hold the tensors its settings ask for: {problems}")
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    for prefix, network in (("encoder.", encoder), ("decoder.", decoder)):
        if network is not None:
            part = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            network.load_state_dict(part, assign=True)
    origin = {**origin, "sha256": digest, "path": str(path)}
    return Tokenizer(encoder, decoder, origin=origin, impl=impl)


def save_tokenizer(
    path: Path,
    encoder: Encoder,
    decoder: Decoder | None = None,
    *,
    origin: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> str:
    """Writes a tokenizer file whole or not at all, and returns the sha256 of its tensors.

    A crash or a full disk leaves what stood at ``path`` before: the bytes go to a temporary file
    beside it, are synced, and then take its name.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, network in (("encoder.", encoder), ("decoder.", decoder)):
        if network is not None:
            for key, tensor in network.state_dict().items():
                tensors[prefix + key] = tensor.detach().to("cpu", dtype).contiguous()
    digest = tensors_sha256(tensors)
    metadata = {
        "format": FORMAT,
        "config": json.dumps(encoder.config.to_dict()),
        "sha256": digest,
        "origin": json.dumps(origin),
    }
    write_atomically(path, save(tensors, metadata))
    return digest


def write_atomically(path: Path, data: bytes) -> None:
    """``data`` at ``path``, durable, or the previous content unharmed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too must survive a power cut
    finally:
        os.close(folder)


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in the order of names; file layout aside."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{key} {dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def network_shapes(encoder: Encoder | None, decoder: Decoder | None) -> dict[str, tuple[int, ...]]:
    """Key in the file -> shape, for the networks given."""
    shapes = {}
    for prefix, network in (("encoder.", encoder), ("decoder.", decoder)):
        if network is not None:
            shapes |= {prefix + k: tuple(t.shape) for k, t in network.state_dict().items()}
    return shapes


def compare_shapes(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    """What differs between two sets of named shapes, in a sentence; "" when nothing does."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    wrong = [
        f"{key} is {list(found[key])}, expected {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in found and found[key] != shape
    ]
    parts = []
    for label, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{len(names)} {label}: {', '.join(names[:3])}{more}")
    return "; ".join(parts)
