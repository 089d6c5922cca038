"""The walk over a tar's headers: damage is found and named, and the index is kept and checked."""

import io
import logging
import os
import tarfile
import tracemalloc

import pytest

from fastbeit.data import open_source
from fastbeit.data import tar_index as tar_index_module
from fastbeit.data.tar_index import cache_folder, walk_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTBEIT_CACHE", str(folder))
    return folder


def make_tar(path, members, **options):
    """A tar of (name, bytes or TarInfo attributes)."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                for attribute, value in content.items():
                    setattr(member, attribute, value)
                tar.addfile(member)
    return str(path)


def images(count, start=0):
    """Members of different lengths, some of them empty or a multiple of a tar's 512 bytes."""
    sizes = [0, 1, 511, 512, 513, 3000]
    return [
        (f"class{i % 3}/{i:04d}.png", bytes([i % 251]) * sizes[i % 6])
        for i in range(start, start + count)
    ]


@pytest.mark.parametrize("cut", ["data", "header", "long name"])
def test_a_truncated_tar_is_named_and_skipped(tmp_path, caplog, cut):
    good = make_tar(tmp_path / "good.tar", images(4))
    name = "n" * 300 + ".png" if cut == "long name" else "last.png"
    bad = make_tar(tmp_path / "bad.tar", [*images(6), (name, b"z" * 2000)])
    with tarfile.open(bad) as tar:
        last = tar.getmembers()[-1]
    # GNU and pax formats put a long name before the header, which starts at last.offset.
    end = {"data": last.offset_data + 1999, "header": last.offset + 100}
    end["long name"] = last.offset + 700
    os.truncate(bad, end[cut])
    with caplog.at_level(logging.WARNING, logger="fastbeit"):
        source = open_source(tmp_path)
    assert len(source) == 4
    assert source.name(0).startswith(good)
    assert len(source.skipped) == 1
    assert source.skipped[0].startswith(f"{bad}: truncated")
    assert bad in caplog.text
    if cut == "data":
        assert "member last.png ends at byte" in source.skipped[0]
    with pytest.raises(ValueError, match=r"no readable tar among 1: .*bad\.tar: truncated"):
        open_source(bad)


def test_a_tar_without_its_end_marker_is_whole(tmp_path):
    path = make_tar(tmp_path / "a.tar", images(6))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 3072  # 3000 bytes and their padding
    os.truncate(path, end)
    source = open_source(path)
    assert source.read(5) == images(6)[5][1]


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = make_tar(tmp_path / "a.tar", images(8))
    with tarfile.open(path) as tar:
        place = tar.getmembers()[4].offset
    with open(path, "r+b") as file:
        file.seek(place + 10)
        file.write(b"\xff\xff")
    with pytest.raises(ValueError, match=f"no valid member header at byte {place}"):
        open_source(path)


def test_a_negative_size_ends_the_walk(tmp_path):
    path = make_tar(tmp_path / "a.tar", images(3))
    with open(path, "r+b") as file:
        header = bytearray(file.read(512))
        header[124:136] = (-512).to_bytes(12, "big", signed=True)  # base 256, as GNU tar writes
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        file.seek(0)
        file.write(header)
    with pytest.raises(ValueError, match="no readable tar"):
        open_source(path)


def test_a_walk_that_goes_back_ends(tmp_path, monkeypatch):
    # What a tarfile without the repair of CVE-2025-8194 does: the same header again and again.
    path = make_tar(tmp_path / "a.tar", images(3))
    with tarfile.open(path) as tar:
        first = tar.next()
    monkeypatch.setattr(tarfile.TarFile, "next", lambda self: first)
    with pytest.raises(ValueError, match=r"damaged: member class0/0000\.png is followed by"):
        open_source(path)


def test_what_is_no_tar_is_named(tmp_path):
    for content in (b"", b"<html>not found</html>" * 100):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"no readable tar among 1: .*a\.tar"):
            open_source(tmp_path / "a.tar")
    make_tar(tmp_path / "b.tar", [("1.json", b"{}"), ("2.json", b"{}")])
    with pytest.raises(ValueError, match=r"no image in 1 tar.* found 2 not an image"):
        open_source(tmp_path / "b.tar")
    make_tar(tmp_path / "c.tar", [])
    with pytest.raises(ValueError, match="found no member at all"):
        open_source(tmp_path / "c.tar")


def test_a_tar_is_walked_once(tmp_path, own_cache, monkeypatch):
    path = make_tar(tmp_path / "a.tar", [*images(5), ("class0/0000.cls", b"5")])
    first = open_source(path)
    assert cache_folder() == own_cache / "tar-index"
    assert len(list(cache_folder().iterdir())) == 1

    def no_walk(path):
        raise AssertionError(f"{path} was walked again")

    monkeypatch.setattr(tar_index_module, "walk_tar", no_walk)
    second = open_source(path)
    assert second.fingerprint == first.fingerprint
    assert second.labels.tolist() == first.labels.tolist()
    assert [second.read(i) for i in range(5)] == [first.read(i) for i in range(5)]
    os.utime(path, ns=(1, 1))
    with pytest.raises(AssertionError, match="walked again"):
        open_source(path)


def test_a_changed_tar_is_walked_again(tmp_path):
    path = make_tar(tmp_path / "a.tar", images(5))
    before = open_source(path).fingerprint
    make_tar(path, images(9))
    assert len(open_source(path)) == 9
    assert open_source(path).fingerprint != before


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not really a zip", None])
def test_a_damaged_cache_costs_a_walk(tmp_path, damage):
    path = make_tar(tmp_path / "a.tar", images(5))
    open_source(path)
    (cached,) = cache_folder().iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert len(open_source(path)) == 5
    assert cached.read_bytes() == whole


def test_an_unwritable_cache_costs_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FASTBEIT_CACHE", str(tmp_path / "file"))
    assert len(open_source(make_tar(tmp_path / "a.tar", images(5)))) == 5


def test_the_cache_follows_the_usual_variables(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTBEIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fastbeit" / "tar-index"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fastbeit" / "tar-index"


def test_a_long_walk_keeps_no_headers(tmp_path):
    path = make_tar(tmp_path / "a.tar", [(f"{i}.png", b"") for i in range(3000)])
    tracemalloc.start()
    index = walk_tar(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index.names) == 3000
    assert peak_bytes < 3000 * 400  # a kept header takes more than a kilobyte
