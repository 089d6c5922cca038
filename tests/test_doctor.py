"""The doctor: what it says about parts that are there, absent, impostors; and about images."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

from fastbeit import doctor, environment, hardware

RunPython = Callable[..., subprocess.CompletedProcess[str]]


def write(path: Path, data: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def distribution(site: Path, name: str, version: str) -> None:
    """Metadata of an installed distribution, without any module."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    write(info / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of sys.path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make these modules look absent."""
    find = environment.find_module
    monkeypatch.setattr(environment, "find_module", lambda n: None if n in names else find(n))


def only_in(site: Path) -> Callable[[], Iterable[metadata.Distribution]]:
    """``importlib.metadata.distributions``, of one folder."""
    find = metadata.distributions
    return lambda: find(path=[str(site)])


# --- apex ---------------------------------------------------------------------------------------


def test_no_apex_is_absent_and_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "apex")
    assert environment.apex().state == "absent"


def test_the_impostor_is_named_and_never_run(site: Path) -> None:
    write(site / "apex" / "__init__.py", "raise SystemExit('the impostor ran')\n")
    distribution(site, "apex", "0.9.10.dev0")
    found = environment.apex()
    assert found.state == "problem"
    assert "0.9.10.dev0" in found.text
    assert "Pyramid" in found.text
    assert "pip uninstall apex" in found.advice


def test_apex_without_its_cuda_part_is_a_problem(site: Path) -> None:
    write(site / "apex" / "__init__.py", "raise SystemExit('apex ran')\n")
    write(site / "apex" / "optimizers" / "fused_adam.py")
    found = environment.apex()
    assert found.state == "problem"
    assert "amp_C" in found.text


def test_real_apex_is_usable(site: Path) -> None:
    write(site / "apex" / "__init__.py")
    write(site / "apex" / "optimizers" / "fused_adam.py")
    write(site / "amp_C.py")
    distribution(site, "apex", "0.1")
    found = environment.apex()
    assert found.usable
    assert "0.1" in found.text


# --- DALI ---------------------------------------------------------------------------------------


def test_a_placeholder_dali_is_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "nvidia.dali")
    monkeypatch.setattr(environment.metadata, "distributions", only_in(site))
    distribution(site, "nvidia-dali", "0.0.1")
    found = environment.dali()
    assert found.state == "problem"
    assert "placeholder" in found.text
    assert "nvidia-dali 0.0.1" in found.text
    assert "fastbeit[gpu]" in found.advice


def test_no_dali_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "nvidia.dali")
    monkeypatch.setattr(environment, "dali_builds", dict)
    found = environment.dali()
    assert found.state == "absent"
    assert "reference" in found.text


def test_two_builds_of_dali_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"nvidia-dali-cuda120": "2.4.0", "nvidia-dali-cuda130": "2.4.0"}
    monkeypatch.setattr(environment, "dali_builds", lambda: both)
    monkeypatch.setattr(environment, "find_module", lambda n: object())
    assert environment.dali().state == "problem"


def test_dali_that_does_not_load_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "broken_dali.py", "raise ImportError('the driver is too old')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    there = environment.Finding("dali", "ok", "2.4.0")
    assert doctor.loadable(there, "json") is there
    found = doctor.loadable(there, "broken_dali")
    assert found.state == "problem"
    assert "2.4.0 does not load: ImportError: the driver is too old" in found.text


# --- GPU, precision, Triton ---------------------------------------------------------------------


def test_a_driver_without_a_cuda_torch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment, "nvidia_driver", lambda: "580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in environment.gpu().text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = environment.gpu()
    assert found.state == "problem"
    assert "580.1" in found.text and "13.0" in found.text
    monkeypatch.setattr(environment, "nvidia_driver", lambda: None)
    assert environment.gpu().state == "absent"


@pytest.mark.parametrize(
    ("flags", "state", "word"),
    [
        ("fpu avx512_bf16 amx_bf16", "ok", "AMX"),
        ("fpu avx512_bf16", "ok", "AVX-512"),
        ("asimd bf16", "ok", "Arm"),
        ("fpu avx2", "absent", "emulated"),
    ],
)
def test_bf16_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, flags: str, state: str, word: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "cpu_features", lambda: frozenset(flags.split()))
    found = environment.precision()
    assert found.state == state
    assert word in found.text


def test_no_triton_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "triton")
    assert environment.triton().state == "absent"


def test_a_converted_tokenizer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dall_e.safetensors"
    monkeypatch.setenv("FASTBEIT_TOKENIZER", str(path))
    assert doctor.dall_e_tokenizer().state == "absent"
    write(path, "weights")
    found = doctor.dall_e_tokenizer()
    assert found.usable
    assert str(path) in found.text


# --- Hardware -----------------------------------------------------------------------------------


def test_a_container_grants_less_than_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    monkeypatch.setattr(hardware, "PROC", tmp_path)
    all_cores = hardware.usable_cores()
    write(tmp_path / "cpu.max", "50000 100000\n")
    assert hardware.usable_cores() == 0.5
    write(tmp_path / "cpu.max", "max 100000\n")
    assert hardware.usable_cores() == all_cores >= 1
    assert hardware.memory_bytes() is None
    write(tmp_path / "meminfo", "MemTotal:  2048 kB\nMemFree: 1 kB\n")
    assert hardware.memory_bytes() == 2048 * 1024
    write(tmp_path / "memory.max", "1048576\n")
    assert hardware.memory_bytes() == 1048576
    write(tmp_path / "memory.max", "max\n")
    assert hardware.memory_bytes() == 2048 * 1024


def test_a_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk() -> environment.Finding:
        return next(f for f in doctor.capacity(tmp_path / "not" / "made") if f.name == "disk")

    monkeypatch.setattr(hardware, "free_disk_bytes", lambda folder: 2**30)
    assert disk().state == "problem"
    monkeypatch.setattr(hardware, "free_disk_bytes", lambda folder: 72 * 2**30)
    assert disk().usable
    assert "72.0 GiB" in disk().text


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    assert 0 < hardware.free_disk_bytes(tmp_path / "not" / "made") <= total


# --- The command --------------------------------------------------------------------------------


def picture(width: int, height: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for k in range(9):
        write(folder / "cat" / f"{k}.jpg", picture(40 + k, 30, "JPEG"))
    write(folder / "dog" / "a.png", picture(500, 400, mode="L"))
    return folder


def lines_of(text: str) -> dict[str, tuple[str, str]]:
    """State and rest of each finding, by name."""
    found = {}
    for line in text.splitlines():
        if line.split(" ", 1)[0] in ("ok", "absent", "problem"):
            found[line[8:21].strip()] = (line.split(" ", 1)[0], line[21:])
    return found


def test_the_command_describes_machine_and_images(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = doctor.main(["--data", str(images), "--run-dir", str(tmp_path), "--samples", "0"])
    text = capsys.readouterr().out
    found = lines_of(text)
    machine_problems = any(
        state == "problem" for name, (state, _) in found.items() if name != "bad images"
    )
    assert code == (doctor.EXIT_MACHINE if machine_problems else doctor.EXIT_OK)
    assert found["torch"][0] == "ok"
    assert found["images"] == ("ok", "10")
    assert "JPEG 9, PNG 1" in found["formats"][1]
    assert "smallest 40×30" in found["sizes"][1]
    assert "largest 500×400" in found["sizes"][1]
    assert "2 classes, 1 to 9 images each" in found["labels"][1]
    assert found["bad images"][0] == "ok"
    for word in ("device: ", "precision: ", "optimizer: ", "kernels: "):
        assert f"\n  {word}" in text
    assert "loader" in text.partition("What will run:")[2]


def test_bad_images_are_named_and_end_with_2(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(images / "cat" / "empty.jpg")
    write(images / "dog" / "text.png", "not an image")
    arguments = ["--data", str(images), "--run-dir", str(tmp_path)]
    assert doctor.main(arguments) == doctor.EXIT_DATA
    text = capsys.readouterr().out
    assert "2 of 12 examined" in text
    assert "empty.jpg: " in text and "text.png: " in text
    assert doctor.main([*arguments, "--max-bad-fraction", "0.5"]) != doctor.EXIT_DATA


def test_no_images_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert doctor.main(["--data", str(empty), "--run-dir", str(tmp_path)]) == doctor.EXIT_DATA
    assert doctor.main(["--data", str(tmp_path / "no"), "--run-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().out.count("problem data") == 2


def test_samples_are_spread_over_the_source(images: Path) -> None:
    from fastbeit.data import open_source

    source = open_source(str(images))
    seen = doctor.survey(source, samples=2, max_pixels=10**6)
    assert (seen.count, seen.examined) == (10, 2)
    assert len(seen.sizes) == 2
    assert doctor.survey(source, samples=99, max_pixels=10**6).examined == 10
    assert len(doctor.survey(source, samples=0, max_pixels=2000).bad) == 1  # 500 × 400 is too large


def test_it_runs_as_a_module(run_python: RunPython, tmp_path: Path) -> None:
    done = run_python("-m", "fastbeit.doctor", "--run-dir", tmp_path, expect=None)
    assert done.returncode in (doctor.EXIT_OK, doctor.EXIT_MACHINE), done.stderr
    assert "What will run:" in done.stdout
    helped = run_python("-m", "fastbeit.doctor", "--help")
    assert "--data PATH" in helped.stdout
