"""Checkpoints: exact, atomic, intact after a failure, and refused when they are none."""

import json
import os
import pathlib
import pickle
import shutil
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp

from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.training import distributed
from fastbeit.training.checkpoint import (
    Checkpointer,
    find_latest,
    load_tensors,
    restore_rng,
    rng_tensors,
    write_durably,
)

TINY = BeitConfig(image_size=32, patch_size=16, width=16, depth=2, heads=2, vocab_size=8)


@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_saved_is_the_state_at_the_call_and_loads_again(tmp_path, world, sharded):
    model = BeitForMim(TINY, seed=1)
    if sharded:
        mesh = distributed.make_mesh(world, "zero2")
        distributed.shard_model(model, mesh, mode="zero2", precision="fp32")
    before = distributed.full_state(model)
    saver = Checkpointer(tmp_path, world, keep=2)
    saver.save(7, model.state_dict(), {"note": "x"})
    with torch.no_grad():  # training goes on while the files are written
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert saver.wait() == 7
    saved = find_latest(tmp_path)
    assert saved is not None and saved.step == 7 and saved.state["note"] == "x"
    load_tensors(saved, model.state_dict(), world)
    after = distributed.full_state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_the_newest_are_kept_and_latest_names_the_last(tmp_path, world):
    saver = Checkpointer(tmp_path, world, keep=2)
    for step in (1, 2, 3):
        saver.save(step, {"x": torch.full((3,), float(step))}, {})
    saver.wait()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    saved = find_latest(tmp_path)
    value = {"x": torch.zeros(3)}
    load_tensors(saved, value, world)
    assert saved.step == 3 and value["x"].tolist() == [3.0] * 3


def test_a_failed_save_leaves_the_one_before_and_says_so(tmp_path, world, monkeypatch):
    saver = Checkpointer(tmp_path, world, keep=2)
    saver.save(1, {"x": torch.ones(3)}, {})
    saver.wait()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    saver.save(2, {"x": torch.zeros(3)}, {})
    with pytest.raises(OSError, match=r"step 2 could not be written.*No space left"):
        saver.wait()
    monkeypatch.undo()
    saved = find_latest(tmp_path)
    value = {"x": torch.zeros(3)}
    load_tensors(saved, value, world)
    assert saved.step == 1 and value["x"].tolist() == [1.0] * 3
    assert not list(tmp_path.glob("*.writing"))
    saver.save(3, {"x": torch.ones(3)}, {})  # and the next attempt works
    assert saver.wait() == 3


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path, world):
    saver = Checkpointer(tmp_path, world, keep=1)
    saver.save(1, {"x": torch.ones(3)}, {})
    saver.wait()
    torn = tmp_path / "step-00000002.writing"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    assert find_latest(tmp_path).step == 1
    Checkpointer(tmp_path, world, keep=1)
    assert not torn.exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "not a complete checkpoint"),
        ("<html>not found</html>", "not a complete checkpoint"),
        ('{"step": "x"}', "not a complete checkpoint"),
        ('{"step": 4, "format": 99}', "checkpoint format 99"),
        ('{"step": 4, "format": 1}', ".metadata is missing"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, state, message):
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    if state is not None:
        (folder / "state.json").write_text(state)
    (tmp_path / "latest").write_text("step-00000004\n")
    with pytest.raises(ValueError, match=message) as error:
        find_latest(tmp_path)
    assert str(folder) in str(error.value)


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert find_latest(tmp_path) is None


def test_other_shapes_are_refused_without_a_traceback_of_internals(tmp_path, world):
    saver = Checkpointer(tmp_path, world, keep=1)
    saver.save(1, {"x": torch.ones(3)}, {})
    saver.wait()
    for tensors in ({"x": torch.zeros(4)}, {"x": torch.zeros(3), "y": torch.zeros(1)}):
        with pytest.raises(ValueError, match="does not fit this model"):
            load_tensors(find_latest(tmp_path), tensors, world)


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_an_index_that_names_foreign_code_is_refused_unexecuted(tmp_path, world, monkeypatch):
    saver = Checkpointer(tmp_path, world, keep=1)
    saver.save(1, {"x": torch.ones(3)}, {})
    saver.wait()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step-00000001" / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"mkdir, which no checkpoint needs"):
        load_tensors(find_latest(tmp_path), {"x": torch.zeros(3)}, world)
    assert not (tmp_path / "executed").exists()


def test_an_index_that_holds_pickled_objects_is_refused(tmp_path, world):
    """Their bytes would be unpickled without limits when read."""
    dcp.save({"x": b"object"}, checkpoint_id=tmp_path / "step-00000001")
    (tmp_path / "step-00000001" / "state.json").write_text('{"step": 1, "format": 1}')
    (tmp_path / "latest").write_text("step-00000001")
    with pytest.raises(ValueError, match="other things than tensors: x"):
        load_tensors(find_latest(tmp_path), {"x": torch.zeros(3)}, world)


def test_generators_go_on_where_they_were(world):
    torch.manual_seed(5)
    states = {name: value.clone() for name, value in rng_tensors(world).items()}
    expected = torch.rand(4)
    torch.rand(9)
    restore_rng(states, world)
    assert torch.equal(torch.rand(4), expected)


def test_write_durably_replaces_whole_files(tmp_path):
    path = tmp_path / "x.json"
    write_durably(path, "old")
    write_durably(path, json.dumps([1]))
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_changed_bytes_are_found_before_they_are_trained_on(tmp_path, world):
    saver = Checkpointer(tmp_path, world, keep=2)
    for step in (1, 2):
        saver.save(step, {"x": torch.arange(4096.0)}, {})
    saver.wait()
    file = tmp_path / "step-00000002" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged.*write step-00000001 into"):
        load_tensors(find_latest(tmp_path), {"x": torch.zeros(4096)}, world)


def test_a_lost_checkpoint_is_named_with_the_one_that_is_left(tmp_path, world):
    saver = Checkpointer(tmp_path, world, keep=2)
    for step in (1, 2):
        saver.save(step, {"x": torch.ones(3)}, {})
    saver.wait()
    shutil.rmtree(tmp_path / "step-00000002")
    with pytest.raises(ValueError, match="can name another one, as it stands: step-00000001"):
        find_latest(tmp_path)


def test_an_index_of_python_3_13_is_read(tmp_path, world, monkeypatch):
    """There, and there alone, paths are pickled as ``pathlib._local.PosixPath``."""
    monkeypatch.setitem(sys.modules, "pathlib._local", pathlib)
    monkeypatch.setattr(pathlib.PosixPath, "__module__", "pathlib._local")
    saver = Checkpointer(tmp_path, world, keep=1)
    saver.save(1, {"x": torch.ones(3)}, {})
    saver.wait()
    value = {"x": torch.zeros(3)}
    load_tensors(find_latest(tmp_path), value, world)
    assert value["x"].tolist() == [1.0] * 3


def test_saving_a_step_again_never_leaves_latest_without_a_checkpoint(tmp_path, world, monkeypatch):
    saver = Checkpointer(tmp_path, world, keep=1)
    saver.save(1, {"x": torch.ones(3)}, {})
    saver.wait()
    real = shutil.rmtree

    def watched(path, **options):
        assert (tmp_path / "step-00000001" / ".metadata").is_file()
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    saver.save(1, {"x": torch.zeros(3)}, {})
    assert saver.wait() == 1
