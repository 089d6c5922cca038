"""Attention blocks under FSDP2 on the ranks torchrun started, against one process without it.

The layout that keeps a trained bias exact: the table is a unit of its own in fp32, the root expands
it once, blocks run in bf16 and take the bias as it is. Each rank writes what it found.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from fastbeit.model.positions import relative_index, relative_rows
from fastbeit.training import distributed
from fastbeit_kernels import attention_packed, expand_rel_pos_bias

GRID, HEADS, WIDTH, BLOCKS, IMAGES = (3, 4), 2, 16, 2, 2
TOKENS = GRID[0] * GRID[1] + 1


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(relative_rows(GRID), HEADS) / 2)

    def forward(self, index: Tensor) -> Tensor:
        return expand_rel_pos_bias(self.weight, index, grid=GRID, impl="triton")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.proj = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)

    def forward(self, x_BTD: Tensor, bias_HTT: Tensor) -> Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (3, HEADS, WIDTH))
        return x_BTD + self.proj(attention_packed(qkv, bias_HTT, impl="triton").flatten(2))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.bias_gradients: list[Tensor] = []

    def forward(self, x_BTD: Tensor, index: Tensor) -> Tensor:
        bias = self.table(index)
        if bias.requires_grad:
            bias.register_hook(self.bias_gradients.append)
        for block in self.blocks:
            x_BTD = block(x_BTD, bias)
        return x_BTD.float().square().mean()


def plain_gradients(model: Stack, images: Tensor, index: Tensor) -> dict[str, Tensor]:
    """bf16 copies of the blocks' weights, fp32 masters: what mixed precision means, by hand."""
    masters = dict(model.named_parameters())
    copies = {
        name: value if name.startswith("table") else value.bfloat16()
        for name, value in masters.items()
    }
    loss = functional_call(model, copies, (images, index))
    return dict(zip(masters, torch.autograd.grad(loss, list(masters.values())), strict=True))


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Stack()
    images = torch.randn(ranks, IMAGES, TOKENS, HEADS * WIDTH).bfloat16()
    index = relative_index(GRID)
    halves = [plain_gradients(model, part, index) for part in images]
    wanted = {name: sum(half[name] for half in halves) / ranks for name in halves[0]}
    wanted_bias = model.bias_gradients[rank]
    model.bias_gradients.clear()

    mesh = init_device_mesh("cpu", (ranks,))
    exact, half = (
        MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    fully_shard(model.table, mesh=mesh, mp_policy=exact)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=half)
    fully_shard(model, mesh=mesh, mp_policy=half)
    model(images[rank], index).backward()

    errors = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert isinstance(gradient, DTensor) and gradient.dtype == torch.float32, name
        difference = gradient.full_tensor() - wanted[name]
        errors[name] = (difference.norm() / wanted[name].norm()).item()
    (bias_gradient,) = model.bias_gradients
    found = {
        "errors": errors,
        "bias_gradient_dtype": str(bias_gradient.dtype),
        "bias_gradient_equal": torch.equal(bias_gradient, wanted_bias),
        "bias_gradient_survives_bf16": torch.equal(bias_gradient, bias_gradient.bfloat16().float()),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    distributed.leave(0)
