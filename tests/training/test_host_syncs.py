"""A step reads nothing back from the device: every operator it calls is watched."""

from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastbeit.batch import MimBatch
from fastbeit.model import BeitConfig, BeitForMim
from fastbeit.tokenizer import load_tokenizer
from fastbeit.training import distributed
from fastbeit.training.chance import PositionalStats
from fastbeit.training.config import OptimizerConfig
from fastbeit.training.optimizer import build_optimizer, set_lr
from fastbeit.training.step import TrainStep, Window

ATEN = torch.ops.aten
READS = {
    ATEN._local_scalar_dense.default,
    ATEN.is_nonzero.default,
    ATEN.equal.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.repeat_interleave.Tensor,
    ATEN.bincount.default,
    ATEN._unique2.default,
    ATEN.unique_dim.default,
}
INDEXED = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default}


METHODS = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.numpy, torch.Tensor.cpu}


class NoReadMethods(TorchFunctionMode):
    """Raises on methods of tensors that read a CPU tensor's memory without any operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS:
            raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


class NoReads(TorchDispatchMode):
    """Raises on operators that wait for a device: reads, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func in INDEXED and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if func in READS or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("position", "precision", "accumulation"),
    [("relative", "bf16", 2), ("absolute", "fp32", 1)],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_step_reads_nothing_back(world, position, precision, accumulation, sharded):
    config = BeitConfig(
        image_size=28,
        patch_size=4,
        width=16,
        depth=2,
        heads=2,
        vocab_size=256,
        position=position,
        drop_path=0.1,
    )
    model = BeitForMim(config, seed=0)
    if sharded:
        distributed.shard_model(
            model, distributed.make_mesh(world, "zero2"), mode="zero2", precision=precision
        )
        weights = nullcontext
    else:
        weights = distributed.place_model(model, world, mode="none", precision=precision).weights
    optimizer, tokenizer = build_optimizer(model, OptimizerConfig()), load_tokenizer("demo")
    stats, window = PositionalStats(49, 256), Window(torch.device("cpu"))
    runner = TrainStep(
        model,
        optimizer,
        lambda batch: tokenizer.encode(batch.token_images, batch.positions),
        world,
        slots=20 * accumulation,
        clip_norm=3.0,
        weights=weights,
        observe=stats.update,
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    batch = MimBatch(
        torch.randn(4, 3, 28, 28).to(dtype),
        torch.rand(4, 3, 7 * tokenizer.stride, 7 * tokenizer.stride),
        torch.tensor([[0, 3, 5, 9, -1]] * 4, dtype=torch.int32),
        torch.ones(4, 4),
        torch.arange(4),
    )
    for step in range(2):
        with NoReads(), NoReadMethods():
            set_lr(optimizer, 1e-3 / (step + 1))
            window.add(runner.run([batch] * accumulation, accumulation))
    for read in (
        window.read,
        window.streak_if_ready,
        stats.measure,
    ):  # the watch works: these do read
        with NoReads(), NoReadMethods(), pytest.raises(AssertionError, match="waits for the"):
            read()
