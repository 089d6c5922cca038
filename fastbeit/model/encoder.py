"""What the masked-image model and the classifier share: embedding, blocks, initialisation.

Parameter names are the official ones, but for ``blocks.i.attn.qkv.bias``, which files hold as
``q_bias`` and ``v_bias`` (see ``PackedQkv``). Shapes: B batch, N patches, T = N + 1 tokens, M mask
slots, D width, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastbeit.model.backends import AUTO, Backends
from fastbeit.model.block import Block, PackedQkv, Pending, add
from fastbeit.model.config import BeitConfig
from fastbeit.model.positions import RelativePositionBias
from fastbeit_kernels import embed_patches

INIT_STD = 0.02


class PatchEmbed(nn.Module):
    """The projection of patches, under its official name; :meth:`BeitEncoder.embed` applies it."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, kernel_size=patch, stride=patch)


class BeitEncoder(nn.Module):
    """Patch and position embedding and the blocks, without a last norm or a head."""

    mask_token: nn.Parameter | None

    def __init__(self, config: BeitConfig, backends: Backends = AUTO) -> None:
        super().__init__()
        self.config = config
        self.backends = backends
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.register_parameter("mask_token", None)
        self.pos_embed = (
            nn.Parameter(torch.empty(1, config.tokens, config.width))
            if config.position == "absolute"
            else None
        )
        self.rel_pos_bias = (
            RelativePositionBias(config.grid, config.heads, backends)
            if config.position == "relative"
            else None
        )
        self.blocks = nn.ModuleList(Block(config, backends) for _ in range(config.depth))

    @property
    def rel_pos(self) -> RelativePositionBias | None:
        """The module of the shared relative table, or None."""
        return self.rel_pos_bias

    def set_checkpointing(self, on: bool) -> None:
        """Whether blocks keep what is inside them for the backward pass, or compute it again."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.checkpointing = on

    def embed(self, images: Tensor, positions: Tensor | None) -> Tensor:
        """``[B, T, D]``: patches, the masked ones replaced, behind CLS, plus absolute positions."""
        config = self.config
        expected = (config.in_channels, *config.image_hw)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be [B, {', '.join(map(str, expected))}], got {list(images.shape)}; "
                "resize them or build the model with another image_size or in_channels"
            )
        if positions is not None:
            if self.mask_token is None:
                raise ValueError(f"{type(self).__name__} has no mask token: positions must be None")
            self._check_positions(images, positions)
        projection = self.patch_embed.proj
        return embed_patches(
            images,
            projection.weight,
            projection.bias,
            self.cls_token.flatten(),
            positions=positions,
            mask_token=None if self.mask_token is None else self.mask_token.flatten(),
            pos_embed=None if self.pos_embed is None else self.pos_embed[0],
            impl=self.backends.kernels,
        )

    @staticmethod
    def _check_positions(images: Tensor, positions: Tensor) -> None:
        if positions.dim() != 2 or positions.shape[0] != images.shape[0]:
            raise ValueError(
                f"positions must be [B, M] with B = {images.shape[0]}, got {list(positions.shape)}"
            )
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise ValueError(
                f"positions must be patch numbers (int32), got {positions.dtype}; "
                "a boolean mask is turned into positions on the CPU, in the plan"
            )

    def encode(
        self,
        images: Tensor,
        positions: Tensor | None = None,
        *,
        drop_scale: Tensor | None = None,
        last_rows: Tensor | None = None,
        collect: list[Tensor] | None = None,
    ) -> Tensor:
        """Output of the last block, before any norm.

        Args:
            images: ``[B, C, h, w]`` normalised, of the configured size.
            positions: ``[B, M]`` masked patches, -1 in empty slots, or None for none.
            drop_scale: ``[B, 2 * depth]`` DropPath factors, or None.
            last_rows: ``[B, M]`` tokens that the last block computes, -1 in empty slots, or None.
            collect: a list to which the output of every block is appended.

        Returns:
            ``[B, T, D]``, or ``[B, M, D]`` with last_rows.
        """
        x, pending = self._run_blocks(images, positions, drop_scale, last_rows, collect)
        return add(x, pending, self.backends.kernels)

    def _run_blocks(
        self,
        images: Tensor,
        positions: Tensor | None,
        drop_scale: Tensor | None,
        last_rows: Tensor | None,
        collect: list[Tensor] | None = None,
    ) -> tuple[Tensor, Pending | None]:
        """:meth:`encode`, with the last branch left to whoever adds it and takes a norm at once."""
        depth = self.config.depth
        if drop_scale is not None and tuple(drop_scale.shape) != (images.shape[0], 2 * depth):
            raise ValueError(
                f"drop_scale must be [B, 2 * depth] = [{images.shape[0]}, {2 * depth}], "
                f"got {list(drop_scale.shape)}"
            )
        x, pending = self.embed(images, positions), None
        bias_HTT = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for number, block in enumerate(self.blocks):
            drop = None if drop_scale is None else drop_scale[:, 2 * number : 2 * number + 2]
            rows = last_rows if number == depth - 1 else None
            if collect is None:
                x, pending = block(x, bias_HTT, drop, rows, pending=pending, defer=True)
            else:
                x = block(x, bias_HTT, drop, rows)
                collect.append(x)
        return x, pending

    def layer_features(self, images: Tensor) -> list[Tensor]:
        """Output of each block, before the last norm: ``depth`` tensors ``[B, T, D]``."""
        collected: list[Tensor] = []
        self.encode(images, collect=collected)
        return collected

    def parameter_count(self) -> int:
        """Trained numbers as the official code counts them: without the keys' biases."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.config.depth * self.config.width

    def _initialise(self, seed: int | None) -> None:
        """The official initialisation, from a generator of its own when a seed is given.

        Normal with std 0.02 cut at ±0.02 (one sigma) for weights, tokens and positions; zero for
        biases and relative tables; then the residual projections of block l (from 1) are divided
        by sqrt(2l).
        """
        if self.cls_token.is_meta:
            return
        generator = None if seed is None else torch.Generator().manual_seed(seed)

        def draw(parameter: Tensor) -> None:
            # Drawn on the CPU, so that a seed means the same on every device.
            # By the inverse distribution: PyTorch's rejection takes ten times as long at one sigma.
            uniform = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            uniform.uniform_(-1, 1, generator=generator).mul_(math.erf(math.sqrt(0.5)))
            values = uniform.erfinv_().mul_(INIT_STD * math.sqrt(2))
            parameter.copy_(values.clamp_(-INIT_STD, INIT_STD))

        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    draw(module.weight)
                    if module.bias is not None:
                        module.bias.zero_()
                elif isinstance(module, nn.LayerNorm):
                    module.reset_parameters()
            for token in (self.cls_token, self.mask_token, self.pos_embed):
                if token is not None:
                    draw(token)
            for number, block in enumerate(self.blocks, start=1):
                assert isinstance(block, Block)
                for projection in (block.attn.proj, block.mlp.fc2):
                    projection.weight.div_(math.sqrt(2 * number))
                for gamma in (block.gamma_1, block.gamma_2):
                    if gamma is not None and self.config.layer_scale is not None:
                        gamma.fill_(self.config.layer_scale)


def split_qkv_bias(bias_3D: Tensor) -> tuple[Tensor, Tensor]:
    """(q_bias, v_bias), views of the packed bias."""
    width = bias_3D.shape[0] // 3
    return bias_3D[:width], bias_3D[2 * width :]


def packed_qkv_names(model: nn.Module) -> list[str]:
    """Names of the qkv modules of a model, to translate their biases."""
    return [name for name, module in model.named_modules() if isinstance(module, PackedQkv)]
