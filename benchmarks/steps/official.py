"""A student and a step as the official BEiT code writes them, in our own words.

Eager modules; patches blended with the mask token by multiplication; attention as scores, plus
bias, softmax, weighted sum; every block on every token; the head on a boolean gather; and a step
that reads loss, accuracy and gradient norm on the host. Parameters have the official names, so that
weights load as they are. Shapes: B images, N patches, T = N + 1 tokens, H heads, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbeit.model import BeitConfig
from fastbeit.model.positions import relative_index


class RelativeBias(nn.Module):
    """One table for all blocks, looked up once a forward."""

    relative_position_index: Tensor

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        rows, columns = config.grid
        offsets = (2 * rows - 1) * (2 * columns - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, config.heads))
        index = relative_index(config.grid)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self) -> Tensor:
        index = self.relative_position_index
        looked_up = self.relative_position_bias_table[index.view(-1)]
        return looked_up.view(*index.shape, -1).permute(2, 0, 1).contiguous()


class Attention(nn.Module):
    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.scale = config.head_width**-0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias_HTT: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        no_bias = torch.zeros_like(self.v_bias, requires_grad=False)
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, no_bias, self.v_bias)))
        q, k, v = qkv.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-2, -1) + bias_HTT[None]
        mixed = scores.softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config)
        self.gamma_1 = nn.Parameter(torch.ones(config.width))
        self.gamma_2 = nn.Parameter(torch.ones(config.width))

    def forward(self, x: Tensor, bias_HTT: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x), bias_HTT)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class Patches(nn.Module):
    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class OfficialStyle(nn.Module):
    """BEiT with one shared relative table and LayerScale, without DropPath."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        if config.position != "relative" or config.layer_scale is None:
            raise ValueError(f"written for a shared relative table and LayerScale, not {config}")
        self.patch_embed = Patches(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.rel_pos_bias = RelativeBias(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size)

    def forward(self, images: Tensor, masked: Tensor) -> Tensor:
        """Logits ``[K, V]`` of the K masked patches of ``masked [B, N]``."""
        x = self.patch_embed(images)
        batch, patches, _ = x.shape
        share = masked.unsqueeze(-1).type_as(self.mask_token)
        x = x * (1 - share) + self.mask_token.expand(batch, patches, -1) * share
        x = torch.cat((self.cls_token.expand(batch, -1, -1), x), dim=1)
        bias_HTT = self.rel_pos_bias()
        for block in self.blocks:
            x = block(x, bias_HTT)
        x = self.norm(x)[:, 1:]
        return self.lm_head(x[masked])


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    logits: Tensor,
    labels: Tensor,
    clip_norm: float,
) -> tuple[Tensor, Tensor]:
    """Loss, backward, clip and step as the official engine orders them, with its host reads."""
    loss = F.cross_entropy(logits.float(), labels)  # as autocast has it
    if not torch.isfinite(loss.detach()).item():
        raise RuntimeError(f"the loss is {loss.item()}")
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    if logits.is_cuda:
        torch.cuda.synchronize()
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    for number in (loss.item(), accuracy, norm.item(), *learning_rates(optimizer)):
        if number < 0:
            raise RuntimeError(f"a meter was given {number}")
    return loss.detach(), norm.detach()


def learning_rates(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Least and greatest, which the official engine logs in every step."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return min(rates), max(rates)
