"""The frozen tokenizer that pre-training asks for target tokens."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from fastbeit.tokenizer import inference
from fastbeit.tokenizer.dvae import Decoder, DvaeConfig, Encoder
from fastbeit_kernels import Impl, linear_argmax


class Tokenizer(nn.Module):
    """Images to code numbers and back; frozen, in eval mode, channels-last.

    Attributes:
        vocab_size: number V of codes.
        stride: input pixels along one side of a token.
        channels: colours that it reads.
        pixel_scale, pixel_offset: the loader gives it ``x * pixel_scale + pixel_offset`` for
            pixels x in [0, 1].
        resample: filter of the view it was trained on.
        origin: where the weights come from, free text and hashes, for ``describe``.
        impl: of the kernels that ``encode`` runs on (see ``inference``): "auto", "triton" (the
            blocks of a frozen table and the head; an error where Triton can't run) or "reference".
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None = None,
        *,
        origin: dict[str, Any] | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if impl not in get_args(Impl):
            raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
        self.impl: Impl = impl
        self.encoder = encoder
        self.decoder = decoder
        self.config: DvaeConfig = encoder.config
        self.origin = dict(origin or {})
        self.vocab_size = self.config.codes
        self.stride = self.config.stride
        self.channels = self.config.channels
        self.resample = self.config.resample
        self.pixel_scale = self.config.pixel_scale
        self.pixel_offset = self.config.pixel_offset
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()

    def train(self, mode: bool = True) -> Tokenizer:
        """Stays in eval mode: a tokenizer inside a training loop must not change."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, token_images: Tensor, positions: Tensor | None = None) -> Tensor:
        """The most likely code of each token, or only of those asked for.

        The head D -> V, 13 % of the published encoder's arithmetic, runs on the asked rows only,
        and its logits are never written out.

        Args:
            token_images: [B, C, h * stride, w * stride], mapped pixels (see ``pixel_scale``), of
                any floating dtype; cast to the weights' dtype.
            positions: [B, M] integer, token numbers in raster order; -1 marks an empty slot.

        Returns:
            int64 [B, h * w], or [B, M] with -1 at the empty slots.

        Raises:
            ValueError: wrong rank, colours, or a size that is no multiple of the stride.
        """
        # In channels-last memory this permutation is a view, and rows are contiguous.
        rows_BND = self.features(token_images).permute(0, 2, 3, 1).flatten(1, 2)
        batch, tokens, width = rows_BND.shape
        if positions is None:
            return self._codes(rows_BND.reshape(-1, width)).view(batch, tokens)
        if positions.ndim != 2 or positions.shape[0] != batch:
            raise ValueError(
                f"positions must be [B, M] with B = {batch}, got {tuple(positions.shape)}"
            )
        slots = positions.long()
        first_row = torch.arange(batch, device=slots.device)[:, None] * tokens
        rows = rows_BND.reshape(-1, width).index_select(
            0, (slots.clamp(min=0) + first_row).flatten()
        )
        return torch.where(slots >= 0, self._codes(rows).view(slots.shape), -1)

    @torch.no_grad()
    def features(self, token_images: Tensor) -> Tensor:
        """What the head reads, [B, D, h, w] in channels-last memory; ``encode``'s first half."""
        self._check_images(token_images)
        images = token_images.to(self.encoder.head.w.dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        return inference.features(self.encoder, images, self.impl)

    @torch.no_grad()
    def logits(self, token_images: Tensor) -> Tensor:
        """All code logits [B, V, h, w]; for tests and statistics, not for training."""
        self._check_images(token_images)
        images = token_images.to(self.encoder.head.w.dtype)
        return self.encoder(images.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """The image that a map of codes stands for.

        Args:
            tokens: [B, h, w] integer codes in [0, V).

        Returns:
            float32 [B, C, h * stride, w * stride] in [0, 1].

        Raises:
            ValueError: no decoder was loaded, wrong rank or dtype, or a code out of range.
        """
        if self.decoder is None:
            raise ValueError(
                "this tokenizer holds no decoder, so it can't draw tokens: convert it again with "
                "the decoder's file (python -m fastbeit.tokenizer.convert encoder.pkl decoder.pkl "
                "OUT.safetensors)"
            )
        if tokens.ndim != 3 or tokens.is_floating_point():
            raise ValueError(
                f"tokens must be integers [B, h, w], got {tokens.dtype} {tuple(tokens.shape)}"
            )
        # A host sync: decoding draws pictures, it is no part of a training step.
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size):
            raise ValueError(
                f"tokens must be in [0, {self.vocab_size}), "
                f"got {int(tokens.min())} to {int(tokens.max())}"
            )
        return self.decoder.pixels(
            self.decoder.from_embeddings(self.decoder.embed(tokens.long()))
        ).contiguous()

    def describe(self) -> dict[str, Any]:
        """What a run folder should record of the tokenizer: plain values."""
        return {
            "codes": self.vocab_size,
            "stride_px": self.stride,
            "channels": self.channels,
            "parameters": sum(p.numel() for p in self.parameters()),
            "encoder_parameters": sum(p.numel() for p in self.encoder.parameters()),
            "has_decoder": self.decoder is not None,
            "config": self.config.to_dict(),
            "kernels": inference.chosen(self.encoder, self.impl),
            **self.origin,
        }

    def _codes(self, rows_RD: Tensor) -> Tensor:
        head = self.encoder.head
        return linear_argmax(rows_RD, head.w[:, :, 0, 0], head.b, impl=self.impl)

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.channels or not images.is_floating_point():
            raise ValueError(
                f"token images must be floating point [B, {self.channels}, H, W], "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        height, width = images.shape[-2:]
        if height == 0 or width == 0 or height % self.stride or width % self.stride:
            raise ValueError(
                f"token images must be multiples of {self.stride} pixels (one token), "
                f"got {height} x {width}: set the token view to tokens a side times {self.stride}"
            )
