"""Says what a file that is not the expected weights really is.

Downloads of the published tokenizer go wrong in a few known ways, and each leaves its mark in the
first bytes.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path

_WGET_LOG = re.compile(rb"^--\d{4}-\d\d-\d\d|saving to|HTTP request sent|^Resolving ", re.I | re.M)
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes, the format's own limit

OFFICIAL_ENCODER = "https://cdn.openai.com/dall-e/encoder.pkl"
OFFICIAL_DECODER = "https://cdn.openai.com/dall-e/decoder.pkl"
HOW_TO_GET = f"""\
The published DALL-E tokenizer is two files; fastbeit downloads nothing itself. Get them, and
convert them once:
    wget -O encoder.pkl {OFFICIAL_ENCODER}
    wget -O decoder.pkl {OFFICIAL_DECODER}
    python -m fastbeit.tokenizer.convert encoder.pkl decoder.pkl {{destination}}
Two things are wrong in the instructions that circulate: `wget -o` (small o) writes wget's log,
not the weights, into the .pkl; and the mirror on conversationhub.blob.core.windows.net is dead."""


def what_is(path: Path) -> str:
    """A phrase for the file's content ("an HTML page ..."), with the likely cause where known."""
    size = path.stat().st_size
    if size == 0:
        return "an empty file: the download wrote nothing (disk full, or stopped before it began)"
    with path.open("rb") as file:
        head = file.read(4096)
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if not head.strip(b"\0"):
        return "zero bytes only: space was reserved, but the download never filled it"
    if text.startswith((b"<!doctype html", b"<html")) or b"<html" in text[:1024]:
        return "an HTML page: the server answered with a web page (a login or error page)"
    if text.startswith(b"<?xml") or text.startswith(b"<error"):
        return (
            "an XML error message: the server refused, as the mirror on "
            "conversationhub.blob.core.windows.net does, which is dead"
        )
    if _WGET_LOG.search(head):
        return (
            "wget's log: `wget -o FILE` (small o) writes its log to FILE; "
            "the option for the download is `wget -O FILE` (capital O)"
        )
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it points to: run `git lfs pull`"
    if head.startswith(b"PK"):
        return "a zip archive as torch.save writes it"
    if head[:1] == b"\x80":
        return "a pickle as older torch.save wrote it"
    header_bytes = int.from_bytes(head[:8], "little")
    if size >= 8 and head[8:9] == b"{" and header_bytes <= _SAFETENSORS_HEADER_LIMIT:
        if 8 + header_bytes > size:
            return "a safetensors file that ends inside its header: the copy was cut off"
        return "a safetensors file"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if b"\0" not in head:
        first_line = head.strip().splitlines()[0][:80].decode("utf-8", "replace")
        return f"a text file that begins {first_line!r}"
    return f"a binary file of an unknown kind ({size:,} bytes, beginning {head[:8].hex()})"
