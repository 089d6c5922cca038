"""kernels/README.md: every example runs, every operation has its row."""

from __future__ import annotations

import re

import pytest
from peer_models import peer

import fastbeit_kernels

NO_OPERATIONS = {"Impl", "MimLoss", "SHOWN_ON_A_GPU", "choose", "not_shown", "why_not"}
EXAMPLES = 9


@pytest.fixture(scope="module")
def readme(repo_root) -> str:
    return (repo_root / "kernels" / "README.md").read_text(encoding="utf-8")


def examples_of(readme: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(EXAMPLES))
def test_an_example_runs(readme, number) -> None:
    example = examples_of(readme)[number]
    assert len(example.splitlines()) <= 13, "an example is to be read in one glance"
    for library in ("timm", "transformers"):
        if f"fastbeit_kernels.{library}" in example:
            peer(library)
    names: dict[str, object] = {}
    exec(compile(example, f"kernels/README.md, example {number}", "exec"), names)
    if "report" in names:
        assert names["report"].skipped == {}
        assert len(names["report"].replaced) == 12 * 4 + 1
    if "tokens" in names:
        assert 197 in names["tokens"].shape


def test_no_example_is_left_out(readme) -> None:
    assert len(examples_of(readme)) == EXAMPLES
    used = " ".join(examples_of(readme))
    unused = {name for name in fastbeit_kernels.__all__ if name not in used}
    assert unused <= NO_OPERATIONS | {"attention", "rel_pos_attention"}


def test_every_operation_has_its_row(readme) -> None:
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(fastbeit_kernels.__all__) - NO_OPERATIONS
    assert len({row.count("|") for row in rows}) == 1
