"""Cuts the demo data set out of Fashion-MNIST: three labelled WebDataset tars of PNGs.

Source: Fashion-MNIST (arXiv 1708.07747), MIT licence, Zalando SE; its four ``.idx`` files as gzip,
from https://github.com/zalandoresearch/fashion-mnist or Debian's package dataset-fashion-mnist.

    python scripts/make_demo_data.py FOLDER_OF_IDX_GZ [--out fastbeit/data/demo]

Train and validation are disjoint cuts of the 60,000 training images, test is a cut of the 10,000
test images; every class has the same share. The same input gives the same bytes: which images are
taken and their order in the tar follow from SHA-256 of their names, headers carry no time and no
owner. (Another zlib version may compress a few PNGs to other bytes; the pixels stay the same.)
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np

CLASSES = (
    "t-shirt-top",  # the source writes "T-shirt/top": its slash would be a folder in a member name
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
# Of the unpacked files: gzip containers differ from mirror to mirror.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
IMAGES_PER_CLASS = {"train": 1000, "validation": 120, "test": 120}
MAX_TOTAL_BYTES = 16_000_000  # of the three tars, padding included: what a package may weigh


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The array in ``folder/name.gz``: uint8 of shape [N, 28, 28] (images) or [N] (labels)."""
    path = folder / f"{name}.gz"
    if not path.is_file():
        raise ValueError(f"expected the Fashion-MNIST file {path}, which does not exist")
    data = gzip.decompress(path.read_bytes())
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256[name]:
        raise ValueError(f"{path}: unpacked sha256 is {digest}, expected {SHA256[name]}")
    dims = data[3]
    shape = struct.unpack_from(f">{dims}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _filtered_rows(image: np.ndarray) -> np.ndarray:
    """PNG's five row filters (RFC 2083, section 6) of a grey image [H, W], as uint8 [5, H, W]."""
    padded = np.zeros((image.shape[0] + 1, image.shape[1] + 1), np.int16)
    padded[1:, 1:] = image
    here, left, up, corner = padded[1:, 1:], padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    guess = left + up - corner
    to_left, to_up, to_corner = abs(guess - left), abs(guess - up), abs(guess - corner)
    paeth = np.where(
        (to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner)
    )
    rows = [here, here - left, here - up, here - ((left + up) >> 1), here - paeth]
    return np.stack([row.astype(np.uint8) for row in rows])


def encode_png(image: np.ndarray) -> bytes:
    """The smallest PNG found for a grey uint8 image [H, W], over row filters and zlib strategies.

    A tar pads each member to 512 bytes, so getting under that line halves a member's data: trying
    24 variants leaves 52 % of the images in one block.
    """
    height, width = image.shape
    filtered = _filtered_rows(image)
    adaptive = np.abs(filtered.view(np.int8).astype(np.int16)).sum(-1).argmin(0)  # RFC 2083, 9.6
    choices = [np.full(height, kind) for kind in range(5)] + [adaptive]
    streams = []
    for kinds in choices:
        rows = np.concatenate(
            [kinds[:, None].astype(np.uint8), filtered[kinds, np.arange(height)]], axis=1
        )
        for strategy in (
            zlib.Z_DEFAULT_STRATEGY,
            zlib.Z_FILTERED,
            zlib.Z_HUFFMAN_ONLY,
            zlib.Z_RLE,
        ):
            deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 8, strategy)
            streams.append(deflate.compress(rows.tobytes()) + deflate.flush())

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", min(streams, key=len))
        + chunk(b"IEND", b"")
    )


def _rank(name: str) -> str:
    """A pseudo-random sort key that no library version can change."""
    return hashlib.sha256(name.encode()).hexdigest()


def choose(labels: np.ndarray, source: str, cuts: dict[str, int]) -> dict[str, list[tuple]]:
    """Disjoint, class-balanced cuts: split -> list of (member name, row), in the tar's order.

    ``cuts`` holds images per class by split. A name is ``class/source-row.png``; ``source`` keeps
    rows of the training file and of the test file apart.
    """
    chosen: dict[str, list[tuple]] = {split: [] for split in cuts}
    for label, class_name in enumerate(CLASSES):
        rows = [int(row) for row in np.flatnonzero(labels == label)]
        members = sorted(
            ((f"{class_name}/{source}-{row:05d}.png", row) for row in rows),
            key=lambda member: _rank(member[0]),
        )
        start = 0
        for split, count in cuts.items():
            chosen[split] += members[start : start + count]
            start += count
    # Ordered by another rank than chosen by: a cut is a window of ranks, one class after the other.
    return {
        split: sorted(members, key=lambda member: _rank(f"order of {member[0]}"))
        for split, members in chosen.items()
    }


def write_tar(path: Path, members: list[tuple], images: np.ndarray) -> None:
    """Writes the members as PNGs into an uncompressed POSIX tar without times and owners."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, row in members:
            data = encode_png(images[row])
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), 0, 0o644
            tar.addfile(info, io.BytesIO(data))


def main(arguments: list[str] | None = None) -> int:
    """Command line: writes the three tars and prints their sizes; 2 on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with the four Fashion-MNIST idx.gz files")
    parser.add_argument("--out", type=Path, default=Path("fastbeit/data/demo"))
    options = parser.parse_args(arguments)
    try:
        arrays = {name: read_idx(options.folder, name) for name in SHA256}
    except ValueError as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    cuts = {"train": ("train", "validation"), "t10k": ("test",)}
    total_bytes = 0
    for source, splits in cuts.items():
        chosen = choose(
            arrays[f"{source}-labels-idx1-ubyte"],
            source,
            {split: IMAGES_PER_CLASS[split] for split in splits},
        )
        for split, members in chosen.items():
            path = options.out / f"{split}-000000.tar"
            write_tar(path, members, arrays[f"{source}-images-idx3-ubyte"])
            total_bytes += path.stat().st_size
            print(f"{path}: {len(members)} images, {path.stat().st_size:,} bytes")
    print(f"together {total_bytes:,} bytes")
    if total_bytes > MAX_TOTAL_BYTES:
        print(f"make_demo_data: more than {MAX_TOTAL_BYTES:,} bytes: cut fewer", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
