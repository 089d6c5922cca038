"""Folders and lists: what is found, in which order, with which labels, and what is refused."""

import os
import pickle

import numpy as np
import pytest

from fastbeit.data import open_source
from fastbeit.data.names import NameTable, fingerprint
from fastbeit.data.source import _expand_braces


def make(root, *names):
    """Files that hold their own name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def names_in(source, root):
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def test_a_folder_is_read_recursively_sorted_and_labelled(tmp_path):
    files = ["b/2.png", "a/x/1.JPEG", "b/10.PNG", "a/0.webp", "c/t.TIF", "c/g.gif", "c/b.bmp"]
    source = open_source(make(tmp_path, *files, "b/readme.txt", "a/labels.json"))
    assert names_in(source, tmp_path) == sorted(files)
    assert source.classes == ["a", "b", "c"]
    np.testing.assert_array_equal(source.labels, [0, 0, 1, 1, 2, 2, 2])
    assert source.labels.dtype == np.int64
    assert [source.read(i) for i in range(7)] == [name.encode() for name in sorted(files)]


def test_an_image_outside_any_class_means_no_labels(tmp_path):
    source = open_source(make(tmp_path, "a/1.jpg", "0.jpg"))
    assert (len(source), source.labels, source.classes) == (2, None, None)
    flat = open_source(make(tmp_path / "flat", "1.jpg", "2.jpg"))
    assert (len(flat), flat.labels) == (2, None)


def test_hidden_files_and_folders_are_left_out(tmp_path):
    make(tmp_path, "a/1.jpg", "a/._1.jpg", ".cache/2.jpg", "a/.thumbs/3.jpg")
    assert names_in(open_source(tmp_path), tmp_path) == ["a/1.jpg"]


def test_links_are_followed_and_loops_end(tmp_path):
    outside = make(tmp_path / "outside", "far/3.jpg", "4.jpg")
    root = make(tmp_path / "root", "b/1.jpg", "b/c/2.jpg")
    (root / "a").symlink_to(root / "b")  # the same folder again: listed once, under its real place
    (root / "b" / "up").symlink_to(root)  # a loop
    (root / "self").symlink_to(root / "self")  # leads to itself
    (root / "broken.jpg").symlink_to(root / "nothing.jpg")
    (root / "d").symlink_to(outside / "far")
    (root / "b" / "linked.jpg").symlink_to(outside / "4.jpg")
    source = open_source(root)
    assert names_in(source, root) == ["b/1.jpg", "b/c/2.jpg", "b/linked.jpg", "d/3.jpg"]
    assert source.classes == ["b", "d"]
    assert source.read(3) == b"far/3.jpg"


def test_two_linked_folders_that_hold_each_other(tmp_path):
    one, two = make(tmp_path / "one", "1.jpg"), make(tmp_path / "two", "2.jpg")
    (one / "to_two").symlink_to(two)
    (two / "to_one").symlink_to(one)
    assert names_in(open_source(one), one) == ["1.jpg", "to_two/2.jpg"]


def test_names_that_are_not_utf8_survive(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    try:
        with open(path, "wb") as file:
            file.write(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    assert os.fsencode(source.name(0)) == path
    assert source.read(0) == b"x"


def test_the_fingerprint_sees_names_and_sizes_but_not_the_place(tmp_path):
    first, second = (make(tmp_path / place, "a/1.jpg", "a/2.jpg") for place in ("x", "y"))
    original = open_source(first).fingerprint
    assert len(original) == 32
    assert int(original, 16) >= 0
    assert open_source(second).fingerprint == original
    (second / "a" / "2.jpg").write_bytes(b"another size")
    assert open_source(second).fingerprint != original
    make(first, "a/3.jpg")
    assert open_source(first).fingerprint != original
    gone = open_source(first)
    (first / "a" / "3.jpg").unlink()
    assert len(gone.fingerprint) == 32  # a vanished file is no error here, but at its read
    with pytest.raises(FileNotFoundError, match=r"3\.jpg"):
        gone.read(2)


def test_fingerprints_tell_boundaries_apart():
    sizes = np.array([1, 2])
    tables = [NameTable.of(names) for names in ([b"ab", b"c"], [b"a", b"bc"], [b"c", b"ab"])]
    assert len({fingerprint(table, sizes) for table in tables}) == 3
    assert fingerprint(tables[0], sizes) != fingerprint(tables[0], sizes, b"shard")


def test_name_tables_are_compact():
    names = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG".encode() for i in range(20_000)]
    table = NameTable.of(names)
    assert [table.raw(i) for i in (0, 777, 19_999)] == [names[i] for i in (0, 777, 19_999)]
    raw_bytes = sum(map(len, names))
    assert len(pickle.dumps(table)) < raw_bytes + 8 * (len(names) + 1) + 1000
    joined = NameTable.joined([table, NameTable.of([]), NameTable.of([b"last"])])
    assert (len(joined), joined[20_000], joined.raw(5)) == (20_001, "last", names[5])


def test_indices_outside_the_source_are_errors(tmp_path):
    source = open_source(make(tmp_path, "1.jpg"))
    for index in (1, -1):
        with pytest.raises(IndexError, match=f"sample {index} does not exist: .* holds 1"):
            source.read(index)


def test_a_list_names_any_file(tmp_path):
    make(tmp_path / "data", "one.jpg", "two words.bin")
    absolute = make(tmp_path / "far", "3.jpg") / "3.jpg"
    text = f"\ufeffone.jpg\r\n\ntwo words.bin\n{absolute}\n"
    (tmp_path / "data" / "list.txt").write_bytes(text.encode())
    source = open_source(tmp_path / "data" / "list.txt")
    assert [source.read(i) for i in range(3)] == [b"one.jpg", b"two words.bin", b"3.jpg"]
    assert source.name(2) == str(absolute)
    assert source.labels is None


@pytest.mark.parametrize(
    ("written", "labels", "classes"),
    [(("7", "0", "7"), [7, 0, 7], None), (("dog", "cat", "dog"), [1, 0, 1], ["cat", "dog"])],
)
def test_a_list_with_labels(tmp_path, written, labels, classes):
    make(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    lines = [f"{i}.jpg\t{label}" for i, label in enumerate(written)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    source = open_source(tmp_path / "list.txt")
    np.testing.assert_array_equal(source.labels, labels)
    assert source.classes == classes


def test_bad_lists_are_refused(tmp_path):
    listing = make(tmp_path, "0.jpg") / "list.txt"
    for text, message in [
        ("\n\n", "no path in .*list.txt"),
        ("0.jpg\t1\n1.jpg\n", "a label on 1 of 2 lines; none for 1.jpg"),
        ("x/0.jpg\nx/1.jpg\n", "none of the first 2 paths .* exists .*x/0.jpg.*own folder"),
    ]:
        listing.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_source(listing)


def test_splits_of_a_folder(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg")
    assert len(open_source(tmp_path, split="train")) == 2
    assert names_in(open_source(tmp_path, split="validation"), tmp_path) == ["val/a/3.jpg"]
    with pytest.raises(ValueError, match=r"no split 'test' .* test or testing; found train, val"):
        open_source(tmp_path, split="test")
    with pytest.raises(ValueError, match="holds the splits train, val, which must not be mixed"):
        open_source(tmp_path)
    make(tmp_path, "extra/4.jpg")
    assert open_source(tmp_path).classes == ["extra", "train", "val"]


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist: expected a folder of images"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no image in .*\.jpeg .* found nothing"):
        open_source(tmp_path)
    make(tmp_path, "a.csv", "b/c.parquet")
    with pytest.raises(ValueError, match=r"no image in .* found a\.csv, b/c\.parquet"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"ends in \.csv: expected a folder, a \.txt list"):
        open_source(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="split='train' applies to 'demo' and to folders"):
        open_source(tmp_path / "a.csv", split="train")
    make(tmp_path, "1.jpg", "old/x.tar")
    with pytest.raises(ValueError, match=r"holds 1 image files and 1 tars .*old/x\.tar"):
        open_source(tmp_path)


def test_braces_expand_as_in_a_shell():
    assert _expand_braces("t-{08..11}.tar") == ["t-08.tar", "t-09.tar", "t-10.tar", "t-11.tar"]
    assert _expand_braces("{8..10}") == ["8", "9", "10"]
    assert _expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert _expand_braces("plain") == ["plain"]
    with pytest.raises(ValueError, match="counts down"):
        _expand_braces("{3..1}")


def test_importing_the_data_package_loads_no_loader(run_python):
    run_python(
        "-c",
        "import sys, fastbeit.data\n"
        "heavy = {'nvidia', 'PIL', 'fastbeit.data.loader'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "try:\n    fastbeit.data.make_loaders\n"
        "except AttributeError as error:\n    assert 'make_loaders' in str(error)\n"
        "else:\n    raise AssertionError('an unknown name was found')\n",
    )
