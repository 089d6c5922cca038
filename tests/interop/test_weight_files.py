"""Weight files: wrappers are opened, everything else is refused by name and executes nothing."""

from __future__ import annotations

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from fastbeit.interop import WeightsError, load_weights, read_tensors, save_weights


class Malicious:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, trace) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def test_official_wrapper_with_namespace_loads(tmp_path, make_mim) -> None:
    model = make_mim()
    save_weights(model, tmp_path / "bare.pth")
    tensors = torch.load(tmp_path / "bare.pth", weights_only=True)["model"]
    wrapped = {
        "model": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": []},
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(lr=1.5e-3, device="cuda", opt_betas=[0.9, 0.999], dist=None),
    }
    torch.save(wrapped, tmp_path / "checkpoint-799.pth")
    other = make_mim()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    report = load_weights(other, tmp_path / "checkpoint-799.pth")
    assert report.missing == ()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_malicious_checkpoint_is_refused_and_not_executed(tmp_path, make_mim, zipped) -> None:
    trace, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"model": {"blocks.0.norm1.weight": torch.zeros(2)}, "args": Malicious(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model = make_mim()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(WeightsError, match=r"evil\.pth is refused: its pickle names .*mkdir"):
        load_weights(model, path)
    assert not trace.exists()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    torch.load(path, weights_only=False)  # the trap is a real one
    assert trace.exists()


def test_code_inside_a_namespace_is_refused(tmp_path) -> None:
    path = tmp_path / "args.pth"
    torch.save({"model": {"a": torch.zeros(2)}, "args": argparse.Namespace(f=os.system)}, path)
    with pytest.raises(WeightsError, match="system, which is code"):
        read_tensors(path)


def test_plain_pickles_and_pickled_modules_are_refused(tmp_path) -> None:
    trace = tmp_path / "executed"
    for protocol, cause in ((2, r"pkl is refused: .*mkdir"), (4, "no pickle of tensors")):
        (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Malicious(trace), protocol))
        with pytest.raises(WeightsError, match=cause):
            read_tensors(tmp_path / "plain.pkl")
    assert not trace.exists()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(WeightsError, match=r"names torch\.nn\.modules\.linear\.Linear"):
        read_tensors(tmp_path / "module.pth")


def truncated_pickle(path) -> None:
    torch.save({"model": {"a": torch.zeros(5000)}}, path)
    path.write_bytes(path.read_bytes()[:9000])


def truncated_safetensors(path) -> None:
    save_file({"a": torch.zeros(5000)}, path)
    path.write_bytes(path.read_bytes()[:9000])


@pytest.mark.parametrize(
    ("name", "make", "cause"),
    [
        ("page.pth", lambda p: p.write_text("\n<!DOCTYPE html><html>404"), "is a web page"),
        ("page.safetensors", lambda p: p.write_text("<html>Sign in</html>"), "is a web page"),
        ("lfs.bin", lambda p: p.write_text("version https://git-lfs.github.com/spec"), "Git LFS"),
        ("empty.pth", lambda p: p.write_bytes(b""), "is empty"),
        ("noise.bin", lambda p: p.write_bytes(bytes(range(255, -1, -1))), "can't be read"),
        ("cut.pth", truncated_pickle, "truncated"),
        ("cut.safetensors", truncated_safetensors, "truncated"),
        ("list.pth", lambda p: torch.save([torch.zeros(2)], p), "holds a list"),
        ("none.pth", lambda p: torch.save({"epoch": 3}, p), "no named tensors, only epoch"),
    ],
)
def test_what_is_no_weights_is_named(tmp_path, name, make, cause) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(WeightsError, match=f"{name}.*{cause}"):
        read_tensors(path)


def test_missing_files_and_empty_directories_are_named(tmp_path) -> None:
    with pytest.raises(WeightsError, match=r"gone\.pth: there is no such file"):
        read_tensors(tmp_path / "gone.pth")
    with pytest.raises(WeightsError, match=r"directory without model\.safetensors"):
        read_tensors(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, make_mim, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    model = make_mim()
    save_weights(model, path)
    old = path.read_bytes()

    def disk_full(tensors, filename, metadata) -> None:
        filename.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("fastbeit.interop.files.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(model, path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=r"suffix must be \.safetensors"):
        save_weights(model, tmp_path / "model.txt")
