"""Pickles made by hand, opcode by opcode: names, sizes and shapes that no converter may believe."""

from __future__ import annotations

import struct
import zipfile

import pytest

from fastbeit.tokenizer.inert_pickle import RefusedPickle, read_saved_object


def write_zip(path, data: bytes, storages: dict[str, bytes] | None = None) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)


def tensor_opcodes(shape: bytes, strides: bytes, offset: bytes = b"K\x00") -> bytes:
    """_rebuild_tensor_v2 of a storage of four floats."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + b"\x89}tR"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02\x82\x01.", "pickle extension 1"),
        (b"\x80\x02cos\nsystem\n.", "names os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "names os.system"),
        (b"(S'touch x'\nios\nsystem\n.", "names os.system"),
        (b"\x80\x02ctorch.nn.modules.linear\nIdentity.__init__.__globals__\n.", "names torch"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.", "no module"),
        (b"\x80\x02X\x01\x00\x00\x00xQ.", "no tensor storage"),
        (b"\x80\x02" + tensor_opcodes(b"(K\x05t", b"(K\x01t") + b".", "beyond its storage"),
        (b"\x80\x02" + tensor_opcodes(b"(K\x02t", b"(K\x04t") + b".", "beyond its storage"),
        (b"\x80\x02" + tensor_opcodes(b"(K\x02K\x09t", b"(K\x00K\x00t") + b".", "beyond its"),
        (b"\x80\x02" + tensor_opcodes(b"(J\xff\xff\xff\xfft", b"(K\x01t") + b".", "impossible"),
        (
            b"\x80\x02" + tensor_opcodes(b"(K\x02t", b"(K\x01t", b"J\xff\xff\xff\xff") + b".",
            "imposs",
        ),
        (b"\x80\x02" + b"(" * 100_000, "can't be read"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "can't be read"),
        (b"garbage", "can't be read"),
    ],
)
def test_hand_made_pickles_are_refused(data, message, tmp_path):
    path = tmp_path / "encoder.pkl"
    write_zip(path, data, {"0": bytes(16)})
    with pytest.raises(RefusedPickle, match=message):
        read_saved_object(path)


def test_storage_of_another_size_is_refused(tmp_path):
    path = tmp_path / "encoder.pkl"
    tensor = tensor_opcodes(b"(K\x04t", b"(K\x01t")
    write_zip(path, b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s.", {"0": bytes(12)})
    saved = read_saved_object(path)
    with pytest.raises(RefusedPickle, match="should have 16 bytes, has 12"):
        saved.load(saved.tensors()["a"])
    write_zip(
        path, b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s.", {"0": struct.pack("<4f", *range(4))}
    )
    saved = read_saved_object(path)
    assert saved.load(saved.tensors()["a"]).tolist() == [0, 1, 2, 3]


def test_a_module_that_contains_itself_is_refused(tmp_path):
    data = (
        b"\x80\x02ctorch.nn.modules.container\nSequential\n)\x81q\x00}X\x08\x00\x00\x00_modules"
        b"}X\x01\x00\x00\x00ah\x00ssb."
    )
    write_zip(tmp_path / "encoder.pkl", data)
    with pytest.raises(RefusedPickle, match="contains itself"):
        read_saved_object(tmp_path / "encoder.pkl").tensors()
