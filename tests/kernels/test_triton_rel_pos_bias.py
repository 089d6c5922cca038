"""The table's expansion and its gradient in Triton, and attention on top of it."""

from __future__ import annotations

import pytest
import torch

from fastbeit.model.positions import relative_index, relative_rows
from fastbeit_kernels import expand_rel_pos_bias, rel_pos_attention, rel_pos_attention_packed

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def table_gradient(table, index, dbias, *, impl, grid=None):
    leaf = table.detach().requires_grad_()
    bias = expand_rel_pos_bias(leaf, index, grid=grid, impl=impl)
    (gradient,) = torch.autograd.grad(bias, leaf, dbias.to(bias.dtype))
    return bias.detach(), gradient


def check(table, index, dbias, grid=None):
    bias, gradient = table_gradient(table, index, dbias, impl="triton", grid=grid)
    plain_bias, plain = table_gradient(table, index, dbias, impl="reference")
    assert torch.equal(bias, plain_bias)
    assert bias.stride() == plain_bias.stride()
    exact = torch.zeros(table.shape, dtype=torch.float64, device=DEVICE)
    exact.index_add_(0, index.long().flatten(), dbias.double().permute(1, 2, 0).flatten(0, 1))
    allowed = 2 * (plain - exact).norm() + torch.finfo(torch.float32).eps * exact.norm()
    assert gradient.dtype == table.dtype
    if table.dtype == torch.float32:
        assert (gradient - exact).norm() <= allowed
    else:
        torch.testing.assert_close(gradient, exact.to(table.dtype), atol=1e-4, rtol=1e-2)
    return gradient


def test_of_beit() -> None:
    index = relative_index((14, 14)).to(DEVICE)
    check(draw(732, 12, seed=1), index, draw(12, 197, 197, seed=2), (14, 14))


@pytest.mark.parametrize("grid", [(5, 7), (7, 5), (1, 6), (3, 1), (1, 1)])
def test_by_the_grid_and_by_the_index(grid) -> None:
    index = relative_index(grid).to(DEVICE)
    tokens = index.shape[0]
    table, dbias = draw(relative_rows(grid), 3, seed=1), draw(3, tokens, tokens, seed=2)
    by_index = check(table, index, dbias)
    by_grid = check(table, index, dbias, grid)
    # Both add a row's places in the order of the image, 128 lanes at a time.
    assert torch.equal(by_index, by_grid)


@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_any_index_and_unused_rows(integer) -> None:
    generator = torch.Generator().manual_seed(4)
    index = torch.randint(3, 40, (23, 23), generator=generator).to(DEVICE, integer)
    table, dbias = draw(50, 5, seed=5), draw(5, 23, 23, seed=6)
    gradient = check(table, index, dbias)
    assert (gradient[:3] == 0).all() and (gradient[40:] == 0).all()
    one_row = check(table, torch.full_like(index, 7), dbias)
    assert (one_row[7] != 0).all() and one_row[8:].abs().max() == 0


def test_a_table_that_is_no_grids_is_reduced_by_the_index() -> None:
    """Two rows more than the grid's: its arithmetic would find the wrong last rows."""
    index = relative_index((2, 3)).to(DEVICE)
    check(draw(relative_rows((2, 3)) + 2, 2, seed=7), index, draw(2, 7, 7, seed=8), (2, 3))


def test_views_dtypes_and_broadcast_gradients() -> None:
    index = relative_index((3, 4)).to(DEVICE)
    rows = relative_rows((3, 4))
    dbias = draw(13, 2, 13, seed=9).transpose(0, 1)
    check(draw(2, rows, seed=10).t(), index.t().contiguous().t(), dbias)
    check(draw(rows, 2, seed=10).bfloat16(), index, draw(2, 13, 1, seed=11).expand(2, 13, 13))


def test_memory_rows_end_inside_the_storage(monkeypatch) -> None:
    """Groups of 8 may be read from the last row too; what nobody wrote is nowhere in the result."""
    index = relative_index((3, 4)).to(DEVICE)
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: make(*a, **k).fill_(float("nan")))
    bias, gradient = table_gradient(
        draw(relative_rows((3, 4)), 2, seed=12), index, draw(2, 13, 13, seed=13), impl="triton"
    )
    assert bias.isfinite().all() and gradient.isfinite().all()
    assert bias.untyped_storage().nbytes() == 2 * 13 * 16 * 4


def test_attention_on_top() -> None:
    grid = (3, 4)
    index, rows = relative_index(grid).to(DEVICE), relative_rows(grid)
    qkv, dout = draw(2, 13, 3, 2, 16, seed=14), draw(2, 13, 2, 16, seed=15)
    positions = torch.tensor([[0, 5, -1], [12, 1, 2]], device=DEVICE)

    def run(impl, packed, dtype=torch.float32):
        x = qkv.to(dtype).requires_grad_()
        table = draw(rows, 2, seed=16).to(dtype).requires_grad_()
        if packed:
            out = rel_pos_attention_packed(x, table, index, grid=grid, impl=impl)
        else:
            q, k, v = x.unbind(2)
            out = rel_pos_attention(
                q[:, :3], k, v, table, index, query_positions=positions, grid=grid, impl=impl
            )
        weights = dout[:, : out.shape[1]].to(dtype)
        return [out.detach(), *torch.autograd.grad(out, (x, table), weights)]

    for packed in (True, False):
        expected = run("reference", packed)
        for mine, theirs in zip(run("triton", packed), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
