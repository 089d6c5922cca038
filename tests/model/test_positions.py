"""Relative index and resized positions against the official ones, and on grids they never had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastbeit.model.positions import RelativePositionBias, relative_index, relative_rows
from fastbeit.model.resize import geometric_ratio, resize_pos_embed, resize_relative_table

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "relative_position.safetensors")


@pytest.mark.parametrize("grid", [(14, 14), (5, 7)])
def test_index_is_the_official_one(grid) -> None:
    expected = GOLDEN[f"index_{grid[0]}x{grid[1]}"].long()
    assert torch.equal(relative_index(grid), expected)
    assert expected.max() == relative_rows(grid) - 1


def test_bias_reads_the_table_at_query_minus_key() -> None:
    module = RelativePositionBias((2, 3), heads=2)
    table = torch.randn(relative_rows((2, 3)), 2)
    module.relative_position_bias_table.data = table
    bias = module()
    # Query (1, 0) is token 4, key (0, 2) token 3: dy = 1, dx = -2.
    row = (1 + 1) * 5 + (-2 + 2)
    assert torch.equal(bias[:, 4, 3], table[row])
    assert torch.equal(bias[:, 0, 2], table[-3])  # CLS asks a patch
    assert torch.equal(bias[:, 2, 0], table[-2])  # a patch asks CLS
    assert torch.equal(bias[:, 0, 0], table[-1])
    assert not bias._is_view()  # sharding warns of modules that return one


@pytest.mark.parametrize("side", [24, 32])
def test_table_is_resized_as_the_official_code_does(side) -> None:
    ours = resize_relative_table(GOLDEN["table_14x14"], (14, 14), (side, side))
    theirs = GOLDEN[f"table_{side}x{side}"]
    assert (ours - theirs).norm() / theirs.norm() <= 1e-4
    assert (ours - theirs).abs().max() <= 1e-4


def test_ratios_of_the_recipe() -> None:
    assert geometric_ratio(13, 23) == pytest.approx(1.09031, abs=5e-6)
    assert geometric_ratio(13, 31) == pytest.approx(1.13492, abs=5e-6)
    assert geometric_ratio(13, 13) == geometric_ratio(13, 5) == 1.0


def test_axes_of_a_table_are_resized_each_by_its_own_rule() -> None:
    """A table that varies along one axis is that axis's curve, resized, everywhere."""
    source, target = (5, 3), (8, 6)
    down = torch.randn(9, generator=torch.Generator().manual_seed(0)).double()
    table = torch.cat((down[:, None].expand(9, 5).reshape(45, 1), torch.ones(3, 1).double()))
    ours = resize_relative_table(table, source, target)[:-3].view(15, 11)
    assert ours.std(1).max() < 1e-12
    square = torch.cat((down[:, None].expand(9, 9).reshape(81, 1), torch.ones(3, 1).double()))
    alone = resize_relative_table(square, (5, 5), (8, 8))[:-3].view(15, 15)[:, 0]
    torch.testing.assert_close(ours[:, 0], alone)


def test_smaller_windows_keep_the_offsets_that_remain() -> None:
    table = torch.randn(relative_rows((4, 5)), 2).double()
    ours = resize_relative_table(table, (4, 5), (2, 3))
    expected = table[:-3].view(7, 9, 2)[2:5, 2:7].reshape(-1, 2)
    torch.testing.assert_close(ours, torch.cat((expected, table[-3:])))


@pytest.mark.parametrize(
    ("source", "target"), [((1, 1), (4, 4)), ((2, 2), (5, 5)), ((1, 6), (3, 9))]
)
def test_tiny_tables_grow_without_breaking(source, target) -> None:
    constant = torch.full((relative_rows(source), 2), 0.7)
    ours = resize_relative_table(constant, source, target)
    assert ours.shape == (relative_rows(target), 2)
    torch.testing.assert_close(ours, torch.full_like(ours, 0.7))


def test_absolute_positions_are_resized_bicubically_with_cls_copied() -> None:
    positions = torch.randn(1, 1 + 6, 4)
    ours = resize_pos_embed(positions, (2, 3), (4, 9))
    assert torch.equal(ours[:, 0], positions[:, 0])
    for channel in range(4):
        plane = positions[0, 1:, channel].view(1, 1, 2, 3)
        expected = F.interpolate(plane, size=(4, 9), mode="bicubic", align_corners=False)
        torch.testing.assert_close(ours[0, 1:, channel], expected.flatten())
    assert resize_pos_embed(positions, (2, 3), (2, 3)) is positions


def test_wrong_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a 3x3 grid is \[28, heads\], got \[52, 4\]"):
        resize_relative_table(torch.zeros(52, 4), (3, 3), (4, 4))
    with pytest.raises(ValueError, match=r"a 3x3 grid are \[1, 10, width\], got \[1, 17, 4\]"):
        resize_pos_embed(torch.zeros(1, 17, 4), (3, 3), (4, 4))
