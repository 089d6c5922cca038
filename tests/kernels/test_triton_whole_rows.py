"""The forward kernel that holds whole rows of scores: against float64, masks, subsets, its limits.

It is chosen by no frozen configuration yet; here it is put in, as the tuning command would.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastbeit_kernels import _configs, attention

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def launched(monkeypatch) -> list[str]:
    """Chooses the kernel; names of the forward kernels that are launched."""
    from fastbeit_kernels._attention import arguments

    tile = _configs.WHOLE_ROW["sm_90", 16]
    config = dataclasses.replace(_configs.attention_config("sm_90", 16, 64), whole_row=tile)
    monkeypatch.setattr(arguments, "attention_config", lambda *_: config)
    names, make = [], arguments.forward_launch

    def note(*values):
        launch = make(*values)
        names.append(launch.kernel.__name__)
        return launch

    monkeypatch.setattr(arguments, "forward_launch", note)
    return names


def problem(queries, keys, width, bias, heads=2, batch=2):
    generator = torch.Generator().manual_seed(keys)
    shapes = [(batch, queries, heads, width), *[(batch, keys, heads, width)] * 2]
    shapes += [(heads, queries, keys)] if bias else []
    return [torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes]


def run(tensors, impl, dtype=torch.float32, positions=None):
    """The output and the gradients of its squares' sum."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
    q, k, v, *bias = leaves
    out = attention(q, k, v, *bias, query_positions=positions, impl=impl)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize(
    ("queries", "keys", "width", "bias"),
    [
        pytest.param(130, 197, 64, True, id="keys of BEiT: three blocks and 16"),
        pytest.param(9, 70, 24, False, id="one block and 16, no bias"),
        pytest.param(5, 128, 16, True, id="two whole blocks"),
        pytest.param(5, 220, 16, True, id="three blocks and 32"),
        pytest.param(5, 180, 16, True, id="two blocks and 64"),
        pytest.param(3, 64, 16, True, id="one whole block"),
    ],
)
def test_values_and_gradients(queries, keys, width, bias, launched) -> None:
    """The gradients say whether the log-sum-exp is right: the backward kernels read it."""
    tensors = problem(queries, keys, width, bias, heads=1 if queries > 100 else 2)
    ours = run(tensors, "triton")
    assert launched == ["attention_forward_rows"]
    plain, truth = run(tensors, "reference"), run(tensors, "reference", torch.float64)
    for number, (mine, theirs, exact) in enumerate(zip(ours, plain, truth, strict=True)):
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (mine, theirs))
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps, number


def test_masked_keys_empty_slots_and_rows_without_a_key(launched) -> None:
    tensors = problem(6, 70, 16, bias=False)
    bias = torch.zeros(2, 70, 70, device=DEVICE)
    bias[:, :, 40:] = float("-inf")
    bias[:, 1] = float("-inf")
    positions = torch.tensor([[0, -1, 1, 2, 3, -1]] * 2, device=DEVICE)
    ours = run([*tensors, bias], "triton", positions=positions)
    assert launched == ["attention_forward_rows"]
    assert all(tensor.isfinite().all() for tensor in ours)
    # Slots 1 and 5 are empty, slot 2 asks for the row that no key is left to.
    assert (ours[0][:, [1, 2, 5]] == 0).all() and (ours[1][:, [1, 2, 5]] == 0).all()
    q, k, v = tensors
    short = [q[:, [0, 3, 4]], k[:, :40], v[:, :40]]
    for mine, theirs in zip(ours, run(short, "reference"), strict=False):
        rows = mine[:, [0, 3, 4]] if mine.shape == q.shape else mine[:, :40]
        torch.testing.assert_close(rows, theirs, rtol=1e-4, atol=1e-5)


def test_the_same_bits_twice_and_in_any_batch() -> None:
    tensors = problem(40, 70, 16, bias=True)
    first, second = run(tensors, "triton"), run(tensors, "triton")
    alone = run([*(x[1:] for x in tensors[:3]), tensors[3]], "triton")
    for mine, again, single in zip(first, second, alone, strict=True):
        assert torch.equal(mine, again)
        assert mine.shape == single.shape or torch.equal(mine[1:], single)


def test_too_few_keys_or_too_many_go_block_by_block(launched) -> None:
    for keys in (63, 225):
        tensors = problem(3, keys, 16, bias=True)
        ours, plain = run(tensors, "triton"), run(tensors, "reference")
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert launched == ["attention_forward", "attention_forward"]
