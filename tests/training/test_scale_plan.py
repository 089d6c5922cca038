"""The table of many GPUs in ``--plan``: what binds, what is assumed, and how it prints."""

from __future__ import annotations

import io
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastbeit import cli
from fastbeit.recipes import load_recipe
from fastbeit.tokenizer import DvaeConfig
from fastbeit.training.config import PretrainConfig
from fastbeit.training.cost import step_flops, student_flops, tokenizer_flops
from fastbeit.training.scale_assumptions import Assumptions, load_assumptions, table
from fastbeit.training.scale_plan import (
    ScaleRow,
    compute_of,
    scale_rows,
    scale_table,
    step_time,
)

H100 = "NVIDIA H100 80GB HBM3"
DALL_E = DvaeConfig()
ROOT = Path(__file__).parents[2]


def base(**run: Any) -> PretrainConfig:
    config = load_recipe("beit-base-in1k")
    tokenizer = replace(config.tokenizer, tokenizer_precision="bf16")
    return replace(config, run=replace(config.run, **run), tokenizer=tokenizer)


def rows(config: PretrainConfig, gpus: int = 8, **changes: Any) -> list[ScaleRow | str]:
    numbers = replace(Assumptions(), **changes)
    return list(scale_rows(config, DALL_E, gpus, device=H100, numbers=numbers))


def step(mode: Any, gpus: int, config: PretrainConfig | None = None, **changes: Any) -> Any:
    numbers = replace(Assumptions(), **changes)
    return step_time(config or base(), DALL_E, mode, gpus, device=H100, numbers=numbers)


def test_arithmetic_is_the_counted_flops_at_the_assumed_share_of_peak() -> None:
    config = base()
    found = compute_of(config, DALL_E, 10, H100, Assumptions(peak_share=0.5))
    tokens = tokenizer_flops(DALL_E, config.model.grid, config.mask.target).total
    # The gradient of the images, which nobody needs, is in the model's factor of 2 (0.3 %).
    patches = student_flops(config.model, config.mask.target).patch_embedding
    counted = step_flops(config, tokens) + patches
    assert found.micro_batch == pytest.approx(10 * counted / (0.5 * 989e12))
    assert found.blocks[0] == found.blocks[10] > found.blocks[11] > 0.4 * found.blocks[0]
    assert found.update == pytest.approx(0.86e-3, rel=0.01)  # 28 bytes of 92 M numbers at 3 TB/s
    given = compute_of(config, DALL_E, 10, H100, Assumptions(), images_per_s=2000)
    # The rate was measured with the update in it.
    assert given.micro_batch + given.update == pytest.approx(10 / 2000)
    fp32 = replace(config, tokenizer=replace(config.tokenizer, tokenizer_precision="fp32"))
    slow = compute_of(fp32, DALL_E, 10, H100, Assumptions(peak_share=0.5))
    assert slow.tokenizer == pytest.approx(found.tokenizer * 989 / 67)


def test_the_rows_of_the_base_recipe() -> None:
    found = rows(base())
    shown = [(row.gpus, row.mode) for row in found if isinstance(row, ScaleRow)]
    modes = ["none", "zero2", "zero3"]  # inside one node hybrid is zero3
    assert shown == [(8, mode) for mode in modes] + [
        (gpus, mode) for gpus in (64, 512) for mode in (*modes, "hybrid")
    ]
    for row in found:
        assert isinstance(row, ScaleRow)
        assert row.images_a_gpu == 2048 // row.gpus
        assert row.images_per_s == pytest.approx(2048 / row.step.seconds)
        assert 0 < row.efficiency <= 1
        assert row.step.gpu.exposed > 0
    by_mode = {(row.gpus, row.mode): row for row in found if isinstance(row, ScaleRow)}
    for mode in modes:
        efficiency = [by_mode[gpus, mode].efficiency for gpus in (8, 64, 512)]
        assert efficiency == sorted(efficiency, reverse=True)
    assert {row.gpus for row in rows(base(), 32) if isinstance(row, ScaleRow)} == {8, 32, 64, 512}


def test_a_batch_that_cannot_be_cut_is_said() -> None:
    found = rows(base(global_batch=96))
    assert found[-2:] == [
        "64 GPUs: --global-batch 96 cannot be split evenly over 64 ranks",
        "512 GPUs: --global-batch 96 cannot be split evenly over 512 ranks",
    ]


@pytest.mark.parametrize(
    ("binds", "gpus", "mode", "changes"),
    [
        ("compute", 8, "none", {}),
        ("launches", 512, "none", {}),
        ("intra-node link", 8, "none", {"nvlink_gb_s": 1}),
        ("network", 64, "hybrid", {"nic_gb_s": 0.1}),
        ("network", 64, "none", {"nics_per_node": 1, "nic_gb_s": 1}),
        ("loader", 8, "none", {"loader_images_s": 100}),
        ("storage", 64, "none", {"storage_gb_s": 0.1}),
        ("checkpoints", 8, "none", {"host_copy_gb_s": 1e-3}),
    ],
)
def test_what_binds(binds: str, gpus: int, mode: Any, changes: dict[str, Any]) -> None:
    assert step(mode, gpus, **changes).binds == binds


def test_collectives_slow_the_arithmetic_beside_them() -> None:
    slowed, free = step("none", 8), step("none", 8, overlap_slowdown=0)
    assert slowed.gpu.compute == free.gpu.compute
    # All but the last two collectives run beside arithmetic.
    most = 0.1 * free.gpu.intra
    assert 0.5 * most < slowed.gpu.seconds - free.gpu.seconds < most


def test_loading_runs_beside_the_gpu_and_checkpoints_do_not() -> None:
    fast = step("none", 8, loader_images_s=1e9, storage_gb_s=1e6, storage_node_gb_s=1e6)
    assert fast.seconds == fast.gpu.seconds + fast.checkpoint
    slow = step("none", 8, loader_images_s=128)
    assert slow.loader == 2.0 and slow.seconds == 2.0 + slow.checkpoint
    # 2048 images of 115 KB by one node at 4 GB/s, by two at 8.
    assert step("none", 8).storage == pytest.approx(2048 * 115e3 / 4e9)
    assert step("none", 16).storage == pytest.approx(2048 * 115e3 / 8e9)
    # 1.1 GB (12 bytes of 92 M numbers) copied at 10 GB/s once in 1,000 steps; a shard of it.
    whole = step("none", 8).checkpoint
    assert whole == pytest.approx(12 * 91.975e6 / 10e9 / 1000, rel=1e-3)
    assert step("zero2", 8).checkpoint == pytest.approx(whole / 8)
    # Written at 1 MB/s it takes longer than the steps in between: the next save waits for the rest.
    waits = step("none", 8, checkpoint_gb_s=1e-3)
    rest = 12 * 91.975e6 / 1e6 - 1000 * step("none", 8).gpu.seconds
    assert waits.checkpoint == pytest.approx(whole + rest / 1000, rel=1e-3)


def test_the_table_prints_its_rows_and_says_what_is_assumed() -> None:
    def printed(**options: Any) -> str:
        text = io.StringIO()
        found = scale_table(base(), DALL_E, 8, device=H100, numbers=Assumptions(), **options)
        Console(file=text, width=110).print(found)
        return text.getvalue()

    text = printed()
    assert max(map(len, text.splitlines())) <= 110
    assert "nothing of it measured" in text
    assert "40% of an NVIDIA H100 80GB HBM3's peak, which is assumed" in " ".join(text.split())
    assert "the tokenizer, in 16 bits, takes 3" in " ".join(text.split())
    lines = [line.split() for line in text.splitlines()]
    for row in rows(base()):
        assert isinstance(row, ScaleRow)
        line = next(x for x in lines if x[:2] == [row.mode, str(row.gpus)])
        assert line[3] == f"{1e3 * row.step.seconds:.1f}"
        assert line[5] == f"{row.images_per_s:,.0f}"
        assert " ".join(line[8:]) == row.step.binds
    assert "2000 images/s, as --images-per-s says" in printed(images_per_s=2000)


def test_assumptions_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"nic_gb_s": 12, "nics_per_node": 1, "overlap_slowdown": 0}))
    numbers = load_assumptions(file)
    assert numbers == replace(Assumptions(), nic_gb_s=12, nics_per_node=1, overlap_slowdown=0)
    assert numbers.network_gb_s == 1.5
    assert load_assumptions(None) == Assumptions()
    given = [line for line in table(numbers).splitlines() if "| given |" in line]
    assert len(given) == 3
    command = cli.parse(["beit-base-in1k", "--plan", "--scale-assumptions", str(file)])
    assert command.numbers == numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read as JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"nic": 1}', r"unknown assumption 'nic': it has gpus_per_node, peak_share"),
        ('{"nic_gb_s": 0}', "nic_gb_s must be a positive number, got 0"),
        ('{"nic_gb_s": "fast"}', 'nic_gb_s must be a positive number, got "fast"'),
        ('{"gpus_per_node": 1.5}', "gpus_per_node must be a whole number, got 1.5"),
        ('{"nics_per_node": 0.5}', "nics_per_node must be a whole number, got 0.5"),
        ('{"image_kb": Infinity}', "image_kb must be a positive number, got Infinity"),
        ('{"image_kb": true}', "image_kb must be a positive number, got true"),
    ],
)
def test_a_wrong_file_of_assumptions_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_assumptions(file)


def test_assumptions_without_a_plan_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(["beit-base-in1k", "--data", "demo", "--scale-assumptions", "mine.json"])
    assert stop.value.code == 2
    assert "--scale-assumptions only goes with --plan" in capsys.readouterr().err


def test_every_assumption_has_a_source_and_stands_in_the_document() -> None:
    for item in fields(Assumptions):
        assert item.metadata["kind"] in ("published", "counted", "estimated")
        assert item.metadata["unit"] and item.metadata["source"]
    assert table() in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_document_shows_the_table_as_it_prints_now() -> None:
    text = io.StringIO()
    found = scale_table(base(), DALL_E, 8, device=H100, numbers=Assumptions())
    Console(file=text, width=110).print(found)
    document = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert "\n".join(line.rstrip() for line in text.getvalue().splitlines()) in document
