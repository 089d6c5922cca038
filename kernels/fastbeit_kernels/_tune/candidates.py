"""Which tiles are worth timing: enumerated, compiled for the GPU, and pruned by what came out."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .._attention import arguments
from .._configs import AttentionConfig, Tile, attention_config
from .._launch import Launch
from .._launches import Record
from .._launches.attention import Shape

PARTS = ("forward", "whole_row", "queries", "keys")
# Programs of the dK/dV kernel for each multiprocessor of the GPU that is tuned on. What is printed
# and frozen is the product, a number.
PROGRAMS_PER_SM = (1, 2, 3, 4)
# Registers of a thread by which a multiprocessor holds two blocks of eight warps, or four of four.
# The kernel of the keys is far above.
CAPPED = {"forward": (None, 128), "queries": (None, 128), "keys": (None,)}


@dataclass(frozen=True)
class Problem:
    """Tensors of one attention call, laid out as in training: packed qkv, padded bias rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    read: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def make_problem(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """Random inputs on a device; on ``"meta"`` shapes alone."""
    batch, heads, tokens, width = shape.batch, shape.heads, shape.keys, shape.width

    def empty(*sizes: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*sizes, dtype=of, device=device)

    qkv, dqkv = (empty(batch, tokens, 3, heads, width) for _ in range(2))
    read = empty(1, heads, tokens, -(-tokens // 8) * 8)
    out, dout = (empty(batch, tokens, heads, width) for _ in range(2))
    lse, delta = (empty(batch, heads, tokens, of=torch.float32) for _ in range(2))
    if device != "meta":
        generator = torch.Generator(device).manual_seed(seed)
        for tensor in (qkv, read, dout):
            tensor.normal_(generator=generator)
    (q, k, v), (dq, dk, dv) = qkv.unbind(2), dqkv.unbind(2)
    return Problem(q, k, v, read, out, lse, dout, delta, dq, dk, dv)


def launches_of(part: str, problem: Problem, config: AttentionConfig) -> list[Launch]:
    """What one part of a step launches: a kernel, and for the keys the sum over slices too."""
    p, scale = problem, problem.q.shape[-1] ** -0.5
    if part in ("forward", "whole_row"):
        if part == "forward":
            config = dataclasses.replace(config, whole_row=None)
        launch = arguments.forward_launch(p.q, p.k, p.v, p.read, None, p.out, p.lse, scale, config)
        return [launch]
    if part == "queries":
        launch = arguments.query_gradient_launch(
            p.q, p.k, p.v, p.read, None, p.out, p.lse, p.dout, p.dq, p.delta, scale, config
        )
        return [launch]
    count = arguments.slices_for(p.read, p.k, config)
    slices = torch.empty(count, *p.read.shape[1:], dtype=torch.float32, device=p.read.device)
    launch = arguments.key_gradient_launch(
        p.q, p.k, p.v, p.read, None, p.lse, p.delta, p.dout, p.dk, p.dv, slices, scale, config
    )
    if count == 1:
        return [launch]
    return [launch, arguments.bias_sum_launch(slices, torch.empty_like(slices[:1]))]


def tiles(part: str, family: str, bits: int, width: int) -> list[Tile | None]:
    """The frozen choice first, then every other that could fit.

    None is the forward without whole rows. Sixteen rows a warp (columns, for the keys' kernel); on
    sm_100 the tensor cores are not tied to warps, and 128 rows may also take four.
    """
    current: Tile | None = getattr(attention_config(family, bits, width), part)
    if part == "whole_row":
        # Its loads are in no loop, so stages mean nothing. The tiles of its keys are 64 wide.
        others = (None, Tile(128, 64, 8, 1), Tile(64, 64, 4, 1)) if bits == 16 else (None,)
        return [current, *(tile for tile in others if tile != current)]
    along, across = ((64, 128), (16, 32, 64, 128)) if bits == 16 else ((16, 32, 64), (16, 32))
    found: list[Tile | None] = [current]
    for rows in along:
        warps = {rows // 16} if bits == 16 else {4, 8}
        if family == "sm_100" and rows == 128:
            warps.add(4)
        for columns in across:
            for count in sorted(warps):
                for stages, cap in product((1, 2, 3), CAPPED[part] if bits == 16 else (None,)):
                    sides = (columns, rows) if part == "keys" else (rows, columns)
                    tile = Tile(*sides, count, stages, cap)
                    if tile != current:
                        found.append(tile)
    return found


def with_tile(config: AttentionConfig, part: str, tile: Tile | None) -> AttentionConfig:
    if part == "whole_row":
        return dataclasses.replace(config, whole_row=tile)
    assert tile is not None
    match part:
        case "forward":
            return dataclasses.replace(config, forward=tile)
        case "queries":
            return dataclasses.replace(config, queries=tile)
        case "keys":
            return dataclasses.replace(config, keys=tile)
    raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")


@dataclass(frozen=True)
class Job:
    """One tile of one part, to be compiled for a target."""

    arch: str
    part: str
    shape: Shape
    dtype: torch.dtype
    tile: Tile | None

    def config(self) -> AttentionConfig:
        from .._inspect.targets import target_of

        padded = arguments.padded_width(self.shape.width)
        config = attention_config(target_of(self.arch).family, self.dtype.itemsize * 8, padded)
        return with_tile(config, self.part, self.tile)


class StandInDriver:
    """A GPU of some compute capability as far as Triton's compiler asks for one."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_as_launched(launch: Launch, capability: int) -> object:
    """Compile through the path a launch takes, so that a launch on the GPU finds it in the cache.

    Only for a process that launches nothing: Triton's driver is replaced.
    """
    from triton.runtime import driver

    driver.set_active(StandInDriver(capability))  # pyright: ignore[reportArgumentType]
    return launch.kernel.warmup(
        **launch.arguments, **launch.constants, **launch.options(), grid=(launch.grid,)
    )


def compile_job(job: Job) -> list[str]:
    """What the compile report has against a tile; nothing: it may be timed."""
    from .._inspect.compiled import read_kernel
    from .._inspect.rules import breaches
    from .._inspect.targets import target_of

    target = target_of(job.arch)
    problem = make_problem(job.shape, job.dtype, "meta")
    found = []
    for launch in launches_of(job.part, problem, job.config()):
        record = Record("", "", launch, 0, 0, 0, 0)
        try:
            kernel = compile_as_launched(launch, target.capability)
        except Exception as error:
            # The compiler's own refusal (too much shared memory, ptxas gives up) is an answer.
            return [f"does not compile: {type(error).__name__}"]
        found += breaches(read_kernel(kernel, record.signature(), target), target)
    return found


def compile_jobs(jobs: list[Job], workers: int) -> Iterator[tuple[Job, list[str]]]:
    """Each job and what speaks against it, in order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from zip(jobs, pool.map(compile_job, jobs), strict=True)


Compiler = Callable[[list[Job], int], Iterator[tuple[Job, list[str]]]]
