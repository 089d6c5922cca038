"""Conversion of pickled modules: the right tensors come out, and nothing in the pickle runs.

The published files are whole modules of a package ``dall_e``. The fixture below defines stand-ins
of that package, pickles whole modules with torch.save, and removes the package again.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastbeit.tokenizer import DvaeConfig, load_tokenizer
from fastbeit.tokenizer.convert import convert, main
from fastbeit.tokenizer.dvae import Decoder, Encoder, initialise
from fastbeit.tokenizer.inert_pickle import RefusedPickle, read_saved_object

CONFIG = DvaeConfig(codes=64, widths=(8, 16, 24), code_width=12)


def fake_package() -> dict[str, types.ModuleType]:
    """Modules dall_e, dall_e.encoder, .decoder, .utils with empty classes of the right names."""
    names = {
        "dall_e.utils": ["Conv2d"],
        "dall_e.encoder": ["Encoder", "EncoderBlock"],
        "dall_e.decoder": ["Decoder", "DecoderBlock"],
    }
    modules = {"dall_e": types.ModuleType("dall_e")}
    for module_name, classes in names.items():
        module = types.ModuleType(module_name)
        for name in classes:
            made = type(name, (nn.Module,), {"__module__": module_name})
            setattr(module, name, made)
        modules[module_name] = module
    return modules


def conv(modules, source) -> nn.Module:
    made = modules["dall_e.utils"].Conv2d()
    made.n_in, made.n_out, made.kw = source.w.shape[1], source.w.shape[0], source.w.shape[2]
    made.use_float16, made.device, made.requires_grad = True, torch.device("cpu"), False
    made.w = nn.Parameter(source.w.detach().clone(), requires_grad=False)
    made.b = nn.Parameter(source.b.detach().clone(), requires_grad=False)
    return made


def published_module(modules, network) -> nn.Module:
    """A module tree like the published one, holding the tensors of ``network``."""
    role = "encoder" if isinstance(network, Encoder) else "decoder"
    classes = modules[f"dall_e.{role}"]
    block_class = getattr(classes, f"{role.capitalize()}Block")
    parts = OrderedDict(input=conv(modules, network.blocks["input"]))
    groups = len(network.config.widths)
    for number in range(1, groups + 1):
        members = OrderedDict()
        for name, block in network.blocks[f"group_{number}"].items():
            made = block_class()
            made.post_gain = block.gain
            skip = block.id_path
            made.id_path = nn.Identity() if skip is None else conv(modules, skip)
            layers = OrderedDict()
            for i, layer in enumerate(block.res_path.values(), 1):
                layers[f"relu_{i}"] = nn.ReLU()
                layers[f"conv_{i}"] = conv(modules, layer)
            made.res_path = nn.Sequential(layers)
            members[name] = made
        if number < groups:
            step = nn.MaxPool2d(2) if role == "encoder" else nn.Upsample(scale_factor=2)
            members["pool" if role == "encoder" else "upsample"] = step
        parts[f"group_{number}"] = nn.Sequential(members)
    head = conv(modules, network.blocks["output"]["conv"])
    parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=head))
    whole = getattr(classes, role.capitalize())()
    whole.blocks = nn.Sequential(parts)
    # A partial of an allowed class among the attributes is harmless.
    whole.make_conv = partial(modules["dall_e.utils"].Conv2d, device="cpu")
    return whole


def torch_save(value, path, *, zipped: bool = True) -> None:
    with warnings.catch_warnings():  # the older layout looks for source code, and warns
        warnings.simplefilter("ignore")
        torch.save(value, path, _use_new_zipfile_serialization=zipped)


@pytest.fixture
def networks():
    pair = Encoder(CONFIG), Decoder(CONFIG)
    for seed, network in enumerate(pair):
        initialise(network, torch.Generator().manual_seed(seed))
        network.requires_grad_(False)
    return pair


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def pickles(request, tmp_path, networks, monkeypatch):
    """Paths of a pickled encoder and decoder; the package that they name is gone again."""
    modules = fake_package()
    paths = tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        for network, path in zip(networks, paths, strict=True):
            torch_save(published_module(modules, network), path, zipped=request.param)
    assert "dall_e" not in sys.modules
    return paths


def test_every_tensor_comes_out(pickles, networks, tmp_path, capsys):
    out = tmp_path / "tokenizer.safetensors"
    assert main([*map(str, pickles), str(out)]) == 0
    assert "dall_e" not in sys.modules
    printed = capsys.readouterr().out
    tokenizer = load_tokenizer(out)
    about = tokenizer.describe()
    assert about["sha256"] in printed
    for source in about["sources"]:
        assert source["sha256"] in printed and source["name"] in printed
    stored = load_file(out)
    expected = {f"encoder.{k}": v for k, v in networks[0].state_dict().items()}
    expected |= {f"decoder.{k}": v for k, v in networks[1].state_dict().items()}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[k], v) for k, v in expected.items())
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        codes = networks[0](images).argmax(1)
    assert torch.equal(tokenizer.encode(images), codes.flatten(1))
    assert tokenizer.config == CONFIG


def test_encoder_alone(pickles, tmp_path):
    convert(pickles[0], None, tmp_path / "t.safetensors")
    assert load_tokenizer(tmp_path / "t.safetensors").decoder is None


def test_a_state_dict_is_taken_too(networks, tmp_path):
    torch_save(networks[0].state_dict(), tmp_path / "encoder.pkl")
    convert(tmp_path / "encoder.pkl", None, tmp_path / "t.safetensors")
    loaded = load_tokenizer(tmp_path / "t.safetensors").encoder.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in networks[0].state_dict().items())


def test_strided_shared_and_half_tensors_keep_their_values(networks, tmp_path):
    weights = dict(networks[0].state_dict())
    base = torch.randn(40)
    weights["blocks.input.b"] = base[3:19:2]  # every second number, from the fourth
    weights["blocks.group_1.block_1.res_path.conv_4.b"] = base[:8]
    name = "blocks.output.conv.w"
    weights[name] = weights[name].to(memory_format=torch.channels_last).bfloat16()
    torch_save(weights, tmp_path / "encoder.pkl")
    convert(tmp_path / "encoder.pkl", None, tmp_path / "t.safetensors")
    loaded = load_tokenizer(tmp_path / "t.safetensors").encoder.state_dict()
    assert all(torch.equal(loaded[k], v.float()) for k, v in weights.items())


class Runs:
    """A pickle that calls ``function(*arguments)`` when it is loaded."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(sentinel) -> dict[str, object]:
    touch = f"touch {sentinel}"
    write = f"open({str(sentinel)!r}, 'w').close()"
    nested = Runs(os.system, Runs(str, touch))
    return {
        "posix.system": Runs(os.system, touch),
        "builtins.eval": Runs(eval, write),
        "builtins.exec": Runs(exec, write),
        "builtins.getattr": Runs(getattr, Runs(__import__, "os"), "system"),
        "builtins.str": nested,
        "builtins.reduce": Runs(__import__("functools").reduce, os.system, [touch]),
        "pathlib": Runs(type(sentinel), str(sentinel)),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", list(attacks("x")))
@pytest.mark.parametrize("where", ["root", "state"])
def test_malicious_pickles_are_refused_and_nothing_runs(
    attack, where, zipped, tmp_path, networks, capsys
):
    sentinel = tmp_path / "ran"
    payload = attacks(sentinel)[attack]
    root = payload if where == "root" else {**networks[0].state_dict(), "hook": [payload]}
    path = tmp_path / "encoder.pkl"
    torch_save(root, path, zipped=zipped)
    assert main([str(path), str(tmp_path / "t.safetensors")]) == 2
    message = capsys.readouterr().err
    assert "nothing was run" in message and "it names " in message
    assert attack in message or attack.startswith(("builtins.str", "builtins.getattr"))
    assert not sentinel.exists()
    assert not (tmp_path / "t.safetensors").exists()
    if attack in ("posix.system", "builtins.eval", "builtins.exec"):  # the attack is a real one
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.load(file, weights_only=False)
            except Exception:
                pass
        assert sentinel.exists()


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


def pickled(value) -> bytes:
    stream = io.BytesIO()
    pickle.dump(value, stream, protocol=2)
    return stream.getvalue()


WGET_LOG = (
    b"--2026-01-05 10:00:00--  https://cdn.openai.com/dall-e/encoder.pkl\n"
    b"Resolving cdn.openai.com... 1.2.3.4\nHTTP request sent, awaiting response... 200 OK\n"
)
BLOB_ERROR = (
    b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-8"?><Error><Code>PublicAccessNotPermitted'
    b"</Code></Error>"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (bytes(2000), "zero bytes only"),
        (b"\n<!DOCTYPE html>\n<html><title>404</title>", "an HTML page"),
        (WGET_LOG, "wget's log: .*small o.*wget -O FILE"),
        (BLOB_ERROR, "mirror on conversationhub.blob.core.windows.net.* is dead"),
        (b"just a note\n", "a text file that begins 'just a note'"),
        (b"\x00\x01\x02binary", "unknown kind"),
        (pickled({"a": 1}), "not one that torch.save wrote"),
    ],
)
def test_files_that_are_no_weights_are_named(content, message, tmp_path, capsys):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(content)
    assert main([str(path), str(tmp_path / "t.safetensors")]) == 2
    captured = capsys.readouterr().err
    assert str(path) in captured
    with pytest.raises(ValueError, match=message):
        convert(path, None, tmp_path / "t.safetensors")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_cut_off_downloads_are_refused(pickles, share, tmp_path):
    data = pickles[0].read_bytes()
    pickles[0].write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"refused as the encoder|is not the encoder"):
        convert(pickles[0], None, tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()


def test_wrong_files_are_named(pickles, networks, tmp_path):
    encoder, decoder = pickles
    out = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match="is the decoder, but was given as the encoder"):
        convert(decoder, encoder, out)
    with pytest.raises(ValueError, match="is the encoder, but was given as the decoder"):
        convert(encoder, encoder, out)
    with pytest.raises(ValueError, match=r"must end in .safetensors, got .*decoder.pkl"):
        convert(encoder, None, decoder)
    with pytest.raises(ValueError, match=r"published as https://cdn.openai.com/dall-e/encoder.pkl"):
        convert(tmp_path / "none.pkl", None, out)
    torch_save({"model": torch.ones(2)}, encoder)
    with pytest.raises(ValueError, match=r"none of them blocks.input.w .*first: model"):
        convert(encoder, None, out)
    torch_save([1, 2], encoder)
    with pytest.raises(ValueError, match="list without any tensor"):
        convert(encoder, None, out)
    other = Decoder(DvaeConfig(codes=32, widths=(8, 16, 24), code_width=12))
    torch_save(networks[0].state_dict(), encoder)
    torch_save(other.state_dict(), decoder)
    with pytest.raises(ValueError, match=r"another tokenizer: it reads 32 codes.* gives 64"):
        convert(encoder, decoder, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.group_2.block_2.res_path.conv_2.b": None}, "1 missing: blocks.group_2.block_2"),
        ({"blocks.input.extra": torch.ones(1)}, "1 unexpected: blocks.input.extra"),
        ({"blocks.output.conv.b": torch.ones(3)}, r"conv.b is \[3\], expected \[64\]"),
        ({"blocks.output.conv.b": torch.full((64,), torch.nan)}, "holds NaN"),
    ],
)
def test_tensors_are_checked_one_by_one(change, message, networks, tmp_path):
    weights = {**networks[0].state_dict(), **change}
    torch_save({k: v for k, v in weights.items() if v is not None}, tmp_path / "encoder.pkl")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "encoder.pkl", None, tmp_path / "t.safetensors")
