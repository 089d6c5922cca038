"""The tuning command: candidates, pruning by the compile report, choice, and what is printed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")

from fastbeit_kernels import _configs
from fastbeit_kernels._configs import AttentionConfig, Tile, attention_config
from fastbeit_kernels._launches.attention import Shape
from fastbeit_kernels._tune import search
from fastbeit_kernels._tune.candidates import PARTS, launches_of, make_problem, tiles, with_tile
from fastbeit_kernels._tune.timing import Timing, summary

SMALL = Shape("small", 3, 2, 17, 17, 16)
BY_ROWS = (Tile(128, 64, 8, 1), Tile(64, 64, 4, 1))
MACHINE = search.Machine("Stand-in GPU", "sm_90", "sm_90", 10)
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU on the CPU"),
]


@pytest.mark.parametrize("family", ["sm_80", "sm_86", "sm_90", "sm_100"])
@pytest.mark.parametrize("bits", [16, 32])
def test_candidates(family, bits) -> None:
    for part in PARTS:
        found = tiles(part, family, bits, 64)
        if part == "whole_row":
            assert set(found) == ({None, *BY_ROWS} if bits == 16 else {None})
            continue
        assert found[0] == getattr(attention_config(family, bits, 64), part)
        assert len(found) == len(set(found)) >= 18
        capped = {tile.maxnreg for tile in found[1:]} - {None}
        assert capped == ({128} if bits == 16 and part != "keys" else set())
        for tile in found[1:] if bits == 16 else ():
            along = tile.columns if part == "keys" else tile.rows
            assert along == 16 * tile.warps or (family, along, tile.warps) == ("sm_100", 128, 4)


def test_a_tile_goes_into_its_own_part() -> None:
    base, tile = attention_config("sm_90", 16, 64), Tile(1, 2, 3, 4)
    for part in PARTS:
        changed = with_tile(base, part, tile)
        assert getattr(changed, part) == tile
        for other in set(PARTS) - {part}:
            assert getattr(changed, other) == getattr(base, other)
    with pytest.raises(
        ValueError, match="part must be one of forward, whole_row, queries, keys, got 'all'"
    ):
        with_tile(base, "all", tile)


def small_candidates(part, family, bits, width):
    """Few and small: the interpreter runs each. The second is said to spill, the third is best."""
    wide = [(32, 16, 2, 1), (16, 32, 2, 1), (16, 16, 1, 1)]
    return [attention_config(family, bits, width).__getattribute__(part), *(Tile(*t) for t in wide)]


def stand_in_compiler(jobs, workers):
    for job in jobs:
        yield (
            job,
            ["spills: 8 bytes of stack"] if job.tile == Tile(32, 16, 2, 1) else [],
        )


def stand_in_timer(contestants, seconds):
    """Says that small tiles of few warps, whole rows and two slices of dBias are fastest."""
    timings = []
    contestants[-1][-1]()
    for calls in contestants:
        assert len(calls) == search.INPUT_SETS
        launches = calls[0].args[0]
        sizes = launches[0].constants
        ms = sizes["ROWS"] * sizes["COLUMNS"] / 1000 + launches[0].warps / 1e5
        ms -= "BLOCKS" in sizes and 1e-5
        if "slices" in launches[0].arguments:
            ms += abs(launches[0].arguments["slices"] - 2) / 1e6
        timings.append(Timing(ms, ms - 0.01, ms + 0.01, 7))
    return timings


def run_tune(monkeypatch, capsys) -> tuple[AttentionConfig, str]:
    monkeypatch.setattr(search, "tiles", small_candidates)
    config = search.tune(
        MACHINE, SMALL, torch.float32, "cpu",
        seconds=0.1, workers=1, timer=stand_in_timer, compiler=stand_in_compiler,
    )  # fmt: skip
    return config, capsys.readouterr().out


def test_the_fastest_that_is_sound_and_right_is_chosen(monkeypatch, capsys) -> None:
    config, said = run_tune(monkeypatch, capsys)
    assert (config.forward, config.queries, config.keys) == (Tile(16, 16, 1, 1),) * 3
    # Ten multiprocessors: 10, 20, 30, 40 programs and the frozen number; 17 keys are two blocks
    # of each of two heads, and the batch of three ends the slices at three.
    assert config.key_programs == 10
    assert config.whole_row == Tile(16, 16, 1, 1)
    assert said.count("Tile(32, 16, 2, 1): spills: 8 bytes of stack") == 4
    assert said.count("3 of 4 candidates are left") == 4
    assert "0.2560 ms (0.2460 to 0.2660, n=7)  Tile(16, 16, 1, 1)" in said
    assert "WRONG" not in said
    assert "Stand-in GPU" in config.source and "forward 0.2560 ms" in config.source
    assert "at 3x2x17" in config.source and "Triton" in config.source


def test_a_wrong_candidate_is_not_timed(monkeypatch, capsys) -> None:
    """As a miscompiled one would be: fast and wrong."""
    right = search.results

    def results(part, problem, config):
        found = right(part, problem, config)
        if getattr(config, part) == Tile(16, 16, 1, 1):
            found[-1].view(-1)[5] = float("nan") if part == "forward" else found[-1].max() * 2
        return found

    monkeypatch.setattr(search, "results", results)
    config, said = run_tune(monkeypatch, capsys)
    assert (config.forward, config.queries, config.keys) == (Tile(16, 32, 2, 1),) * 3
    assert said.count("Tile(16, 16, 1, 1): WRONG") == 4
    assert config.whole_row is None


def test_nothing_left_keeps_the_frozen_choice(monkeypatch, capsys) -> None:
    def refuse(jobs, workers):
        return ((job, ["does not compile: PTXASError"]) for job in jobs)

    monkeypatch.setattr(search, "tiles", small_candidates)
    config = search.tune(
        MACHINE, SMALL, torch.float32, "cpu",
        seconds=0.1, workers=1, timer=stand_in_timer, compiler=refuse,
    )  # fmt: skip
    assert (
        with_tile(config, "keys", config.keys).forward == attention_config("sm_90", 32, 64).forward
    )
    assert capsys.readouterr().out.count("nothing to time") == 4


def test_what_is_printed_is_an_entry() -> None:
    tiles = Tile(1, 2, 3, 4, 128), Tile(5, 6, 7, 8), Tile(9, 10, 11, 12)
    plain = AttentionConfig(*tiles, 13, 'a "b"')
    names = {"AttentionConfig": AttentionConfig, "Tile": Tile}
    for config in (plain, dataclasses.replace(plain, whole_row=Tile(14, 15, 16, 17))):
        text = search.entry("sm_90", 16, 64, config)
        assert eval("{\n" + text + "\n}", names) == {("sm_90", 16, 64): config}
        assert set(eval("{\n" + text + "\n}", names)) <= set(_configs.ATTENTION)


def test_problems_are_laid_out_as_in_training() -> None:
    problem = make_problem(Shape("B", 4, 12, 197, 197), torch.bfloat16, "meta")
    assert problem.q.stride() == (197 * 3 * 768, 3 * 768, 64, 1) == problem.dq.stride()
    assert problem.read.shape == (1, 12, 197, 200)
    config = attention_config("sm_90", 16, 64)
    launches = {part: launches_of(part, problem, config) for part in PARTS}
    names = {part: [one.kernel.__name__ for one in found] for part, found in launches.items()}
    assert names == {
        "forward": ["attention_forward"],
        "whole_row": ["attention_forward"],
        "queries": ["attention_backward_queries"],
        "keys": ["attention_backward_keys", "bias_gradient_sum"],
    }
    config = dataclasses.replace(config, whole_row=BY_ROWS[0])
    found = [launches_of(part, problem, config)[0].kernel.__name__ for part in PARTS[:2]]
    assert found == ["attention_forward", "attention_forward_rows"]
    first, second = (make_problem(SMALL, torch.float32, "cpu", seed) for seed in (0, 1))
    assert not torch.equal(first.q, second.q) and bool(first.dout.std() > 0.5)


def test_median_and_spread() -> None:
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0]) == Timing(3.0, 1.0, 5.0, 5)
    assert summary([float(n) for n in range(101)]) == Timing(50.0, 10.0, 90.0, 101)


def test_without_a_gpu_it_says_so(run_python, compile_environment) -> None:
    command = ("-m", "fastbeit_kernels.tune")
    environment = {**compile_environment, "CUDA_VISIBLE_DEVICES": ""}
    done = run_python(*command, env=environment, expect=2)
    assert "tune: there is no GPU to measure on. --list shows what would be timed" in done.stderr
    done = run_python(*command, env={**environment, "TRITON_INTERPRET": "1"}, expect=2)
    assert "tune: TRITON_INTERPRET is set" in done.stderr
    done = run_python(*command, "--dtype", "int8", env=environment, expect=2)
    assert "--dtype must be of bf16, fp16, fp32, got int8" in done.stderr
    done = run_python(*command, "--list", "--arch", "sm_75", env=environment, expect=2)
    assert "arch must be one of sm_80" in done.stderr and "got 'sm_75'" in done.stderr


@pytest.mark.parametrize("command", ["inspect", "tune"])
def test_without_triton_both_commands_say_so(run_python, compile_environment, command) -> None:
    """As where it was never installed: no module of that name can be found."""
    code = (
        "import sys\n"
        "class Nowhere:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Nowhere())\n"
        "import runpy\n"
        f"sys.argv = ['{command}']\n"
        f"runpy.run_module('fastbeit_kernels.{command}', run_name='__main__')\n"
    )
    done = run_python("-c", code, env=compile_environment, expect=2)
    assert f"{command}: triton is not installed; pip install triton" in done.stderr


PRUNE = """
import json, sys, torch
from fastbeit_kernels._configs import Tile
from fastbeit_kernels._inspect.compiled import compile_source
from fastbeit_kernels._inspect.targets import target_of
from fastbeit_kernels._launches import launches
from fastbeit_kernels._launches.attention import TRAINING
from fastbeit_kernels._tune.candidates import Job, compile_as_launched, compile_jobs

if __name__ == "__main__":
    tiles = [Tile(128, 64, 8, 2, 128), Tile(64, 64, 8, 2), Tile(128, 64, 8, 2, 64)]
    jobs = [Job("sm_90", "forward", TRAINING[0], torch.bfloat16, tile) for tile in tiles]
    against = [found for _, found in compile_jobs(jobs, 1)]
    same = []
    for arch in ("sm_80", "sm_90"):
        target = target_of(arch)
        for record in launches(target.family)[:3]:
            launch = record.launch
            arguments = record.source_arguments()
            read = compile_source(arguments, launch.options(), target)[1]
            launched = compile_as_launched(launch, target.capability)
            same.append(read.asm["ptx"] == launched.asm["ptx"])
    print(json.dumps([against, same]))
"""


def test_real_candidates_are_pruned_and_the_report_reads_what_launches_run(
    run_python, compile_environment, tmp_path
) -> None:
    script = tmp_path / "prune.py"
    script.write_text(PRUNE)
    # Its own cache: code names its source file, and the common cache may hold another checkout's.
    environment = {**compile_environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = run_python(script, env=environment, timeout_s=200)
    (sound, twice, spilled), same = json.loads(done.stdout)
    assert sound == []
    assert "a tile is computed 2 times by 8 warps" in twice[0]
    assert "spills: " in spilled[0]
    # Through the path of a launch, by a stand-in for the GPU, the code is that of the report.
    assert same == [True] * 6
