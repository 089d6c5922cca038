"""Who runs the student: each with the problem's weights, forward and backward.

A `Student` gives the logits of the masked patches, in raster order over the batch, and the mean
loss. All hold fp32 weights. ``dtype`` below fp32: ours compute with copies of all but the relative
table, made anew in every call as in training; others run under autocast, which casts the weights in
every call too.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import Unavailable
from benchmarks.steps.official import OfficialStyle
from benchmarks.steps.problem import Problem, masked_map
from fastbeit.batch import MimBatch
from fastbeit.interop import save_weights
from fastbeit.interop.weights import official_state
from fastbeit.model import Backends, BeitForMim
from fastbeit.training.one_device import WorkingWeights

MODELING = "transformers.models.beit.modeling_beit"


@dataclass
class Student:
    """A model and how a batch goes through it."""

    module: nn.Module
    logits: Callable[[MimBatch], Tensor]
    """``[K, V]`` of the K masked patches."""
    loss: Callable[[MimBatch, Tensor], Tensor]
    """Mean over the masked patches, of ``[B, M]`` targets; with a graph where recorded."""
    patch_weight: Tensor
    """Its gradient has passed every block."""

    def both(self, batch: MimBatch, targets: Tensor) -> Tensor:
        """Forward and backward; gradients replace those of before."""
        self.module.zero_grad()
        loss = self.loss(batch, targets)
        loss.backward()
        return loss.detach()

    def gradient_norm(self) -> Tensor:
        found = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.stack([grad.float().norm() for grad in found]).norm()


class WithoutPruning(BeitForMim):
    """All tokens go through the last block, as in the definition."""

    def loss(self, *tensors: Any, drop_scale: Tensor | None = None, prune: bool = False) -> Any:
        return super().loss(*tensors, drop_scale=drop_scale, prune=prune)


def of_fastbeit(model: BeitForMim, device: torch.device, dtype: torch.dtype) -> Student:
    model.to(device)
    exact = () if model.rel_pos is None else (model.rel_pos,)
    weights = WorkingWeights(model, dtype, exact)

    def logits(batch: MimBatch) -> Tensor:
        prune = not isinstance(model, WithoutPruning)
        with weights():
            found = model(batch.images.to(dtype), batch.positions, prune=prune)
        return found[batch.positions >= 0]

    def loss(batch: MimBatch, targets: Tensor) -> Tensor:
        with weights():
            return model.loss(batch.images.to(dtype), batch.positions, targets).loss

    return Student(model, logits, loss, model.patch_embed.proj.weight)


def reference(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
    """Plain PyTorch, nothing pruned."""
    backends = Backends(kernels="reference")
    return of_fastbeit(problem.student(WithoutPruning, backends), device, dtype)


def fast(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
    """What ``--kernels auto`` builds, with last-block pruning."""
    return of_fastbeit(problem.student(), device, dtype)


def kernels(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
    """What ``--kernels triton`` builds: every kernel, shown to be ahead or not."""
    backends = Backends(kernels="triton", attention="triton")
    return of_fastbeit(problem.student(backends=backends), device, dtype)


def blocks_of(student: Student) -> Iterable[nn.Module]:
    return student.module.blocks  # pyright: ignore[reportReturnType]


def compile_each(modules: Iterable[nn.Module]) -> None:
    """One by one: a few graphs, whatever the depth. No shape changes, so none is dynamic."""
    for module in modules:
        module.compile(dynamic=False)


def compiled(build: Callable[[Problem, torch.device, torch.dtype], Student]) -> Callable[..., Any]:
    """Ours of ``build``, each block compiled, as ``--compile on`` does."""

    def both(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
        student = build(problem, device, dtype)
        compile_each(blocks_of(student))
        return student

    return both


def of_others(
    problem: Problem,
    module: nn.Module,
    forward: Callable[[Tensor, Tensor, Tensor], Tensor],
    patch_weight: Tensor,
    dtype: torch.dtype,
) -> Student:
    """``forward(images, masked map, positions)`` gives the logits ``[B, M, V]`` at positions, of
    which empty slots are ignored: how many there are isn't waited for."""

    def everywhere(batch: MimBatch) -> Tensor:
        masked = masked_map(batch.positions, problem.model.patches)
        with torch.autocast(batch.images.device.type, dtype, enabled=dtype != torch.float32):
            return forward(batch.images, masked, batch.positions)

    def logits(batch: MimBatch) -> Tensor:
        return everywhere(batch)[batch.positions >= 0]

    def loss(batch: MimBatch, targets: Tensor) -> Tensor:
        found = everywhere(batch).flatten(0, 1).float()
        return F.cross_entropy(found, targets.flatten(), ignore_index=-1)

    return Student(module, logits, loss, patch_weight)


def at_positions(rows_BND: Tensor, positions: Tensor) -> Tensor:
    """``[B, M, D]``; an empty slot has the first row."""
    index = positions.long().clamp(min=0)[..., None].expand(-1, -1, rows_BND.shape[-1])
    return rows_BND.gather(1, index)


def official_style(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
    model = OfficialStyle(problem.model)
    model.load_state_dict(official_state(problem.student()))
    model.to(device)

    def logits(batch: MimBatch) -> Tensor:
        masked = masked_map(batch.positions, problem.model.patches)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(batch.images, masked)

    def loss(batch: MimBatch, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(batch).float(), targets[targets >= 0])

    return Student(model, logits, loss, model.patch_embed.proj.weight)


def transformers(
    problem: Problem, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> Student:
    """transformers' own masked-image BEiT, loaded from a file that fastbeit.interop wrote."""
    module = _library("transformers", MODELING)
    module.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_weights(problem.student(), folder, "hf")
        model, info = module.BeitForMaskedImageModeling.from_pretrained(
            folder, output_loading_info=True, attn_implementation=attention
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise Unavailable(f"transformers loads other names than were written: {info}")
    model.train().to(device)

    def forward(images: Tensor, masked: Tensor, positions: Tensor) -> Tensor:
        return at_positions(model(images, bool_masked_pos=masked).logits, positions)

    projection = model.beit.embeddings.patch_embeddings.projection
    return of_others(problem, model, forward, projection.weight, dtype)


def transformers_compiled(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
    """The same, its layers compiled one by one."""
    student = transformers(problem, device, dtype)
    kind = _library("transformers", MODELING).models.beit.modeling_beit.BeitLayer
    compile_each(module for module in student.module.modules() if isinstance(module, kind))
    return student


class TimmMim(nn.Module):
    """timm's BEiT, which has neither mask token nor masked-image head, with both added."""

    def __init__(self, body: Any, problem: Problem) -> None:
        super().__init__()
        self.body = body
        self.mask_token = nn.Parameter(torch.zeros(1, 1, problem.model.width))
        self.lm_head = nn.Linear(problem.model.width, problem.model.vocab_size)

    def forward(self, images: Tensor, masked: Tensor, positions: Tensor) -> Tensor:
        body = self.body
        x = torch.where(masked[..., None], self.mask_token, body.patch_embed(images))
        x = torch.cat((body.cls_token.expand(len(x), -1, -1), x), dim=1)
        bias = body.rel_pos_bias()
        for block in body.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        return self.lm_head(at_positions(body.norm(x)[:, 1:], positions))


def timm(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
    library = _library("timm", "timm.models.beit")
    config = problem.model
    body = library.models.beit.Beit(
        img_size=config.image_hw,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        qkv_bias=True,
        init_values=config.layer_scale,
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
        num_classes=0,
        global_pool="",
    )
    model = TimmMim(body, problem)
    state = official_state(problem.student())
    own = {name: state.pop(name) for name in ("mask_token", "lm_head.weight", "lm_head.bias")}
    missing, unexpected = model.load_state_dict(
        {**own, **{f"body.{name}": tensor for name, tensor in state.items()}}, strict=False
    )
    left = [name for name in missing if not name.endswith(("k_bias", "relative_position_index"))]
    if left or unexpected:
        raise Unavailable(f"timm's BEiT has other names: {[*left, *unexpected]}")
    model.to(device)
    return of_others(problem, model, model, body.patch_embed.proj.weight, dtype)


def timm_compiled(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
    """timm's, its blocks compiled one by one."""
    student = timm(problem, device, dtype)
    compile_each(student.module.body.blocks)  # type: ignore[union-attr]
    return student


def _library(name: str, part: str) -> Any:
    """timm or transformers, or `Unavailable` with the reason.

    Both import torchvision, whose common wheel is built for CUDA: beside a CPU-only torch the
    module that gives its operators shape rules raises. BEiT uses none of them, so an empty module
    stands in.
    """
    if torch.version.cuda is None:
        stand_in = "torchvision._meta_registrations"
        sys.modules.setdefault(stand_in, types.ModuleType(stand_in))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what their own imports deprecate
            importlib.import_module(part)
            return importlib.import_module(name)
    except Exception as error:  # a broken build may raise anything
        raise Unavailable(f"import {part}: {type(error).__name__}: {error}") from error
