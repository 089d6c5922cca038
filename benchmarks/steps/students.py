"""Who runs the student: each with the problem's weights, forward and backward.

A `Student` gives the logits of the masked patches, in raster order over the batch, and the mean
loss. ``dtype`` below fp32: ours hold 16-bit weights but for the relative table, as FSDP2 hands them
to the blocks in training; others run under autocast, as they are trained.
"""

from __future__ import annotations

import copy
import importlib
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
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

PATCH_WEIGHT = "patch_embed.proj.weight"
"""Its gradient has passed every block."""


@dataclass
class Student:
    """A model and how a batch goes through it."""

    module: nn.Module
    logits: Callable[[MimBatch], Tensor]
    """``[K, V]`` of the K masked patches."""
    loss: Callable[[MimBatch, Tensor], Tensor]
    """Mean over the masked patches, of ``[B, M]`` targets; with a graph where recorded."""
    patch_weight: Tensor

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
    exact = None if model.rel_pos is None else copy.deepcopy(model.rel_pos.state_dict())
    model.to(device, dtype)
    if model.rel_pos is not None and exact is not None:
        model.rel_pos.float().load_state_dict(exact)

    def logits(batch: MimBatch) -> Tensor:
        prune = not isinstance(model, WithoutPruning)
        found = model(batch.images.to(dtype), batch.positions, prune=prune)
        return found[batch.positions >= 0]

    def loss(batch: MimBatch, targets: Tensor) -> Tensor:
        return model.loss(batch.images.to(dtype), batch.positions, targets).loss

    return Student(model, logits, loss, model.patch_embed.proj.weight)


def reference(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
    """Plain PyTorch, nothing pruned."""
    backends = Backends(kernels="reference")
    return of_fastbeit(problem.student(WithoutPruning, backends), device, dtype)


def fast(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
    """What ``--kernels auto`` builds, with last-block pruning."""
    return of_fastbeit(problem.student(), device, dtype)


def compiled(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
    """The same, each block compiled, as ``--compile on`` does."""
    student = fast(problem, device, dtype)
    for block in student.module.blocks:  # pyright: ignore[reportGeneralTypeIssues]
        block.compile()
    return student


def of_others(
    problem: Problem,
    module: nn.Module,
    forward: Callable[[Tensor, Tensor], Tensor],
    patch_weight: Tensor,
    dtype: torch.dtype,
) -> Student:
    """``forward(images, masked map)`` gives the logits of masked patches."""

    def logits(batch: MimBatch) -> Tensor:
        masked = masked_map(batch.positions, problem.model.patches)
        with torch.autocast(batch.images.device.type, dtype, enabled=dtype != torch.float32):
            return forward(batch.images, masked)

    def loss(batch: MimBatch, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(batch).float(), targets[targets >= 0])

    return Student(module, logits, loss, patch_weight)


def official_style(problem: Problem, device: torch.device, dtype: torch.dtype) -> Student:
    model = OfficialStyle(problem.model)
    model.load_state_dict(official_state(problem.student()))
    model.to(device)
    return of_others(problem, model, model, model.patch_embed.proj.weight, dtype)


def transformers(
    problem: Problem, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> Student:
    """transformers' own masked-image BEiT, loaded from a file that fastbeit.interop wrote."""
    module = _library("transformers", "transformers.models.beit.modeling_beit")
    module.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_weights(problem.student(), folder, "hf")
        model, info = module.BeitForMaskedImageModeling.from_pretrained(
            folder, output_loading_info=True, attn_implementation=attention
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise Unavailable(f"transformers loads other names than were written: {info}")
    model.train().to(device)

    def forward(images: Tensor, masked: Tensor) -> Tensor:
        return model(images, bool_masked_pos=masked).logits[masked]

    projection = model.beit.embeddings.patch_embeddings.projection
    return of_others(problem, model, forward, projection.weight, dtype)


class TimmMim(nn.Module):
    """timm's BEiT, which has neither mask token nor masked-image head, with both added."""

    def __init__(self, body: Any, problem: Problem) -> None:
        super().__init__()
        self.body = body
        self.mask_token = nn.Parameter(torch.zeros(1, 1, problem.model.width))
        self.lm_head = nn.Linear(problem.model.width, problem.model.vocab_size)

    def forward(self, images: Tensor, masked: Tensor) -> Tensor:
        body = self.body
        x = torch.where(masked[..., None], self.mask_token, body.patch_embed(images))
        x = torch.cat((body.cls_token.expand(len(x), -1, -1), x), dim=1)
        bias = body.rel_pos_bias()
        for block in body.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        return self.lm_head(body.norm(x)[:, 1:][masked])


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
    """timm's, its blocks compiled one by one: three graphs at most, whatever the depth."""
    student = timm(problem, device, dtype)
    for block in student.module.body.blocks:  # type: ignore[union-attr]
        block.compile()
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
