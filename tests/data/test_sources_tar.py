"""Tars: read in place and at random, never extracted, indexed once; damaged ones are named."""

import gzip
import io
import os
import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from fastbeit.data import open_source
from fastbeit.data import source as source_module
from fastbeit.data import tar as tar_module
from fastbeit.data.tar import TarSource


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


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_every_member_is_read_in_place(tmp_path, tar_format):
    members = images(20)
    if tar_format != tarfile.USTAR_FORMAT:
        members += [("deep/" * 40 + "long.jpg", b"long name"), ("d/naïve.jpg", b"not ASCII")]
    path = make_tar(tmp_path / "a.tar", members, format=tar_format)
    source = open_source(path)
    assert [source.name(i) for i in range(len(source))] == [f"{path}!{name}" for name, _ in members]
    order = np.random.default_rng(0).permutation(len(members))
    assert [source.read(i) for i in order] == [members[i][1] for i in order]
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "cache"]  # nothing was extracted


def test_many_shards_are_one_source(tmp_path):
    for shard in range(3):
        make_tar(tmp_path / f"t-{shard:03d}.tar", images(5, start=5 * shard))
    everything = [content for _, content in images(15)]
    for spec in (tmp_path, f"{tmp_path}/t-*.tar", f"{tmp_path}/t-{{000..002}}.tar"):
        source = open_source(spec)
        assert [source.read(i) for i in range(len(source))] == everything
        assert source.name(7) == f"{tmp_path}/t-001.tar!class1/0007.png"
    with pytest.raises(ValueError, match=r"nothing matches .*t-003\.tar"):
        open_source(f"{tmp_path}/t-{{000..003}}.tar")
    with pytest.raises(ValueError, match="nothing matches"):
        open_source(f"{tmp_path}/u-*.tar")
    with pytest.raises(IndexError, match="sample 15 does not exist"):
        source.read(15)


def test_splits_by_the_names_of_tars(tmp_path):
    make_tar(tmp_path / "train-0.tar", images(4))
    make_tar(tmp_path / "train-1.tar", images(4, start=4))
    make_tar(tmp_path / "val-0.tar", images(2))
    assert len(open_source(tmp_path, split="train")) == 8
    assert len(open_source(tmp_path, split="validation")) == 2
    with pytest.raises(ValueError, match="holds the splits train, val, which must not be mixed"):
        open_source(tmp_path)


def test_labels_from_folders_and_from_cls_members(tmp_path):
    folders = open_source(make_tar(tmp_path / "f.tar", [("train/b/1.png", b""), ("a/2.png", b"")]))
    assert (folders.labels.tolist(), folders.classes) == ([1, 0], ["a", "b"])
    numbers = [("x/0.cls", b"12\n"), ("x/0.jpg", b""), ("x/1.v2.jpg", b""), ("x/1.cls", b"3")]
    numbered = open_source(make_tar(tmp_path / "n.tar", numbers))
    assert (numbered.labels.tolist(), numbered.classes) == ([12, 3], None)
    words = [("0.jpg", b""), ("0.cls", b"dog"), ("1.jpg", b""), ("1.cls", b"cat")]
    worded = open_source(make_tar(tmp_path / "w.tar", words))
    assert (worded.labels.tolist(), worded.classes) == ([1, 0], ["cat", "dog"])
    neither = open_source(make_tar(tmp_path / "0.tar", [*words[:3], ("a/2.jpg", b"")]))
    assert (neither.labels, neither.classes) == (None, None)


def test_members_that_could_do_harm_are_never_used(tmp_path):
    members = [
        ("ok/1.png", b"fine"),
        ("../up.png", b"evil"),
        ("a/../../b.png", b"evil"),
        ("/etc/abs.png", b"evil"),
        ("link.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("hard.png", {"type": tarfile.LNKTYPE, "linkname": "ok/1.png"}),
        ("device.png", {"type": tarfile.CHRTYPE}),
        ("pipe.png", {"type": tarfile.FIFOTYPE}),
        ("folder.png", {"type": tarfile.DIRTYPE}),
        ("ok/1.pickle", b"cos\nsystem\n(S'false'\ntR."),
        ("ok/1.json", b"{}"),
        ("ok/._1.png", b"AppleDouble"),
        ("./ok/2.png", b"fine too"),
    ]
    source = open_source(make_tar(tmp_path / "a.tar", members))
    assert [source.read(i) for i in range(len(source))] == [b"fine", b"fine too"]
    first = f"{tmp_path}/a.tar!"
    assert source.ignored == {
        "path with ..": (2, first + "../up.png"),
        "absolute path": (1, first + "/etc/abs.png"),
        "link": (2, first + "link.png"),
        "neither file nor folder": (2, first + "device.png"),
        "folder": (1, first + "folder.png"),
        "pickle, never read": (1, first + "ok/1.pickle"),
        "not an image": (1, first + "ok/1.json"),
        "hidden": (1, first + "ok/._1.png"),
    }
    again = open_source(tmp_path / "a.tar")  # now from the cache
    assert again.ignored == source.ignored


def test_compressed_tars_are_refused_with_advice(tmp_path):
    path = make_tar(tmp_path / "a.tar", images(3))
    packed = tmp_path / "packed" / "b.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    for spec in (packed, packed.parent):
        with pytest.raises(ValueError, match=r"b\.tar\.gz.*ecompress"):
            open_source(spec)
    disguised = tmp_path / "c.tar"
    shutil.copy(packed, disguised)
    with pytest.raises(ValueError, match=r"c\.tar is compressed \(gzip\)"):
        open_source(disguised)


def test_the_fingerprint_sees_names_and_sizes_but_not_the_folder(tmp_path):
    (tmp_path / "other").mkdir()
    path = make_tar(tmp_path / "a.tar", images(5))
    moved = shutil.copy(path, tmp_path / "other" / "a.tar")
    renamed = shutil.copy(path, tmp_path / "other" / "b.tar")
    fewer = make_tar(tmp_path / "other" / "c.tar", images(4))
    prints = [open_source(spec).fingerprint for spec in (path, moved, renamed, fewer)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_pickled_source_reads(tmp_path):
    source = open_source(make_tar(tmp_path / "a.tar", images(12)))
    expected = [source.read(i) for i in range(12)]  # opens the tar before the copy
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(i) for i in range(12)] == expected


def test_a_forked_source_reads_and_closes_only_its_own(tmp_path, run_python):
    # In a process of its own: forking this one, which has threads, is warned of.
    run_python(
        "-c",
        "import os, sys\n"
        "from fastbeit.data import open_source\n"
        "source = open_source(sys.argv[1])\n"
        "expected = [source.read(i) for i in range(12)]\n"
        "child = os.fork()\n"
        "same = [source.read(i) for i in range(12)] == expected\n"
        "if child == 0:\n    source.close()\n    os._exit(not same)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert same and [source.read(i) for i in range(12)] == expected\n",
        make_tar(tmp_path / "a.tar", images(12)),
    )


def open_files():
    return len(os.listdir("/dev/fd"))


def test_threads_read_together(tmp_path):
    paths = [make_tar(tmp_path / f"{k}.tar", images(6, start=6 * k)) for k in range(5)]
    source = TarSource(paths)
    expected = [content for _, content in images(30)]
    results = {}

    def read_all(thread):
        order = np.random.default_rng(thread).permutation(30)
        results[thread] = all(source.read(i) == expected[i] for i in order)

    threads = [threading.Thread(target=read_all, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


def test_open_files_are_bounded_and_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "_MAX_OPEN_SHARDS", 2)
    paths = [make_tar(tmp_path / f"{k}.tar", images(6, start=6 * k)) for k in range(5)]
    source = TarSource(paths)
    before = open_files()
    assert [source.read(i) for i in range(30)] == [content for _, content in images(30)]
    assert open_files() == before + 2
    # Two threads that open one shard at once end up with one descriptor.
    assert source._open(0) == source._open(0)
    assert open_files() == before + 2
    source.close()
    assert open_files() == before
    assert source.read(5) == images(6)[5][1]
    del source
    assert open_files() == before


def test_a_tar_that_shrank_is_an_error_at_the_read(tmp_path):
    path = make_tar(tmp_path / "a.tar", images(12))
    source = open_source(path)
    os.truncate(path, 5000)
    with pytest.raises(OSError, match=r"a\.tar!class2/0011\.png: expected 3000 bytes .* changed"):
        source.read(11)


def test_the_demo_is_in_the_package():
    splits = {name: open_source("demo", split=name) for name in ("train", "validation", "test")}
    assert open_source("demo").fingerprint == splits["train"].fingerprint
    for source in splits.values():
        assert source.classes == splits["train"].classes
        assert len(source.classes) == 10
        assert np.bincount(source.labels).min() > 0
        assert source.read(len(source) - 1).startswith(b"\x89PNG\r\n\x1a\n")
        assert source.skipped == ()
    with pytest.raises(ValueError, match="the demo has the splits train, validation, test; got 'x"):
        open_source("demo", split="x")


def test_missing_demo_data_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "DEMO_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"demo data are missing: no test-\*\.tar .*Install"):
        open_source("demo", split="test")
