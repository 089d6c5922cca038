"""The registered operators: compilation, autocast, checkpoints, refusals, a copied package."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fastbeit_kernels
from fastbeit.model.positions import relative_index, relative_rows
from fastbeit_kernels import attention, attention_packed, expand_rel_pos_bias
from fastbeit_kernels import rel_pos_attention_packed as rel_pos_packed

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = (3, 4)
TOKENS = 13


def draw(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_(grad)


def operators():
    from fastbeit_kernels._attention import ops
    from fastbeit_kernels._rel_pos_bias import ops as table_ops

    return ops, table_ops


def test_opcheck() -> None:
    ops, table_ops = operators()
    q, k, v = draw(2, 9, 2, 16), draw(2, 20, 2, 16), draw(2, 20, 2, 16, seed=1)
    qkv, bias = draw(2, 9, 3, 2, 16), draw(2, 9, 20)
    read = ops._readable(bias, q.dtype, 20)
    opcheck(ops.attention_forward, (q, k, v, bias, read, None, 0.25))
    opcheck(ops.attention_forward, (q, k, v, None, None, None, 0.25))
    positions = torch.tensor([[0, 3, -1], [2, 1, 5]], dtype=torch.int32, device=DEVICE)
    opcheck(ops.attention_forward, (q[:, :3].detach(), k, v, bias, read, positions, 0.25))
    square = bias[..., :9].detach().requires_grad_()
    read = ops._readable(square, q.dtype, 9)
    opcheck(ops.attention_packed_forward, (qkv, square, read, 0.25))
    index = relative_index(GRID).to(DEVICE)
    table = draw(relative_rows(GRID), 2)
    for grid in (GRID, (0, 0)):
        opcheck(table_ops.expand_forward, (table, index, *grid))


# PyTorch's compiler imports deprecated parts of PyTorch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend) -> None:
    index = relative_index(GRID).to(DEVICE)
    positions = torch.tensor([[0, 3, -1], [12, 1, 5]], device=DEVICE)

    def model(table, qkv, query):
        bias = expand_rel_pos_bias(table, index, grid=GRID, impl="triton")
        x = attention_packed(qkv, bias, impl="triton") * 2
        k, v = qkv[:, :, 1], x
        return attention(query, k, v, bias, query_positions=positions, impl="triton")

    inputs = [draw(relative_rows(GRID), 2), draw(2, TOKENS, 3, 2, 16), draw(2, 3, 2, 16)]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = model(*inputs)
    found = compiled(*inputs)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights)
    )


def test_automatic_choice_compiles_too() -> None:
    qkv = draw(2, TOKENS, 3, 2, 16)
    compiled = torch.compile(attention_packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), attention_packed(qkv))


def test_autocast_casts_queries_keys_and_values_but_not_the_bias() -> None:
    qkv, bias = draw(2, 9, 3, 2, 16), draw(2, 9, 9)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention_packed(qkv, bias, impl="triton")
        apart = attention(*qkv.unbind(2), bias, impl="triton")
    assert out.dtype == apart.dtype == torch.bfloat16
    dqkv, dbias = torch.autograd.grad(out.float().square().sum(), (qkv, bias))
    assert dqkv.dtype == dbias.dtype == torch.float32
    assert not torch.equal(dbias, dbias.bfloat16().float()), "dBias was rounded to 16 bits"


def test_checkpointing_gives_the_same_gradients() -> None:
    qkv, bias = draw(2, 9, 3, 2, 16), draw(2, 9, 9)

    def block(qkv, bias):
        return attention_packed(qkv * 2, bias, impl="triton")

    plain = torch.autograd.grad(block(qkv, bias).square().sum(), (qkv, bias))
    out = checkpoint(block, qkv, bias, use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    again = torch.autograd.grad(out.square().sum(), (qkv, bias))
    for mine, theirs in zip(again, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    qkv, bias = draw(2, 9, 3, 2, 16), draw(2, 9, 9)
    out = attention_packed(qkv, bias.detach(), impl="triton")
    (with_frozen_bias,) = torch.autograd.grad(out.square().sum(), qkv)
    out = attention_packed(qkv, bias, impl="triton")
    both = torch.autograd.grad(out.square().sum(), (qkv, bias))
    assert torch.equal(both[0], with_frozen_bias)
    out = attention_packed(qkv.detach(), bias, impl="triton")
    assert torch.equal(torch.autograd.grad(out.square().sum(), bias)[0], both[1])
    with torch.no_grad():
        assert attention_packed(qkv, bias, impl="triton").grad_fn is None


def test_second_derivatives_are_refused() -> None:
    qkv, bias, q = draw(2, 5, 3, 1, 16), draw(1, 5, 5), draw(2, 5, 1, 16)
    table, index = draw(relative_rows(GRID), 1), relative_index(GRID).to(DEVICE)
    losses = {
        "attention has no second": (attention(q, q, q, bias, impl="triton"), q),
        "attention has no second derivative": (attention_packed(qkv, bias, impl="triton"), qkv),
        "expand_rel_pos_bias has no": (expand_rel_pos_bias(table, index, impl="triton"), table),
    }
    for message, (out, leaf) in losses.items():
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            gradient.square().sum().backward()


def test_what_the_kernels_cannot_do_is_refused_or_left_to_the_reference() -> None:
    wide, double = draw(1, 4, 3, 1, 160), draw(1, 4, 3, 1, 16).double()
    empty = draw(0, 4, 3, 1, 16)
    for qkv, message in (
        (wide, "head widths up to 128, and q has 160"),
        (double, "float32, float16 and bfloat16, and q is torch.float64"),
        (empty, "there is nothing to compute"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_packed(qkv, impl="triton")
        assert attention_packed(qkv).shape == (*qkv.shape[:2], *qkv.shape[3:])
    table = torch.zeros(12, 2, dtype=torch.float64, device=DEVICE)
    index = torch.zeros(4, 4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"and table is torch\.float64"):
        expand_rel_pos_bias(table, index, impl="triton")
    qkv = draw(1, 4, 3, 2, 16)
    with pytest.raises(ValueError, match="rel_pos_attention_packed: impl='triton' was asked for"):
        rel_pos_packed(qkv, table, index, impl="triton")


def test_a_renamed_copy_lives_beside_the_package(tmp_path, monkeypatch) -> None:
    """Someone vendors the package as ``outer.our_kernels``: other operators, same results."""
    source = next(iter(fastbeit_kernels.__path__))
    (tmp_path / "outer_package").mkdir()
    (tmp_path / "outer_package" / "__init__.py").touch()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, tmp_path / "outer_package" / "our_kernels", ignore=ignored)
    monkeypatch.syspath_prepend(str(tmp_path))
    copy = __import__("outer_package.our_kernels", fromlist=["attention_packed"])
    try:
        qkv, bias = draw(2, 9, 3, 2, 16), draw(2, 9, 9)
        found = copy.attention_packed(qkv, bias, impl="triton")
        assert torch.equal(found, attention_packed(qkv, bias, impl="triton"))
        assert hasattr(torch.ops.outer_package_our_kernels, "attention_packed_forward")
        assert hasattr(torch.ops.fastbeit_kernels, "attention_packed_forward")
        own = sys.modules["outer_package.our_kernels._attention.ops"]
        assert own.attention_packed_forward is not operators()[0].attention_packed_forward
    finally:
        for name in [name for name in sys.modules if name.startswith("outer_package")]:
            del sys.modules[name]


def test_importing_needs_no_triton_and_no_gpu(run_python) -> None:
    run_python(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "torch.cuda.is_available = torch.cuda.get_device_capability = None\n"
        "import fastbeit_kernels as k\n"
        "assert not any(name.startswith('triton.') for name in sys.modules)\n"
        "qkv = torch.randn(1, 4, 3, 2, 16)\n"
        "assert k.attention_packed(qkv).shape == (1, 4, 2, 16)\n"
        "import importlib.util; importlib.util.find_spec = lambda name: None\n"
        "try: k.attention_packed(qkv, impl='triton')\n"
        "except RuntimeError as error: assert 'triton is not installed' in str(error), error\n"
        "else: raise AssertionError",
        env={"PYTHONPATH": str(next(iter(fastbeit_kernels.__path__))).rsplit("/", 1)[0]},
    )


def test_on_a_cpu_the_interpreter_must_be_asked_for(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="on the CPU, where Triton runs only with TRITON_INTER"):
        attention_packed(torch.zeros(1, 4, 3, 2, 16), impl="triton")
    with pytest.raises(RuntimeError, match="the kernels are for NVIDIA GPUs"):
        attention_packed(torch.zeros(1, 4, 3, 2, 16, device="meta"), impl="triton")
