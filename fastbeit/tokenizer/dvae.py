"""The discrete VAE of DALL-E (arXiv 2102.12092, appendix A.2): encoder and decoder networks.

The default ``DvaeConfig`` is the published network, whose tensors keep their published names
(``blocks.group_1.block_1.res_path.conv_1.w`` ...); other widths and strides give the project's own
tokenizers. Legend: B batch, C channels, H, W pixels, h, w tokens (H / stride, W / stride),
D width of the last group, V codes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DvaeConfig:
    """Shape of a discrete VAE and of the pixels it wants.

    Attributes:
        channels: colours of the image, 1 or 3.
        codes: size V of the codebook.
        widths: channels of the encoder's groups; 2 x 2 max-pooling between them, so that a token
            covers ``stride = 2 ** (len(widths) - 1)`` pixels a side. The decoder mirrors them.
        blocks_per_group: residual blocks a group.
        kernel: side of the first convolution, in pixels, odd.
        code_width: channels of the decoder's code embeddings.
        likelihood: "logit-laplace" (published: mean and scale for each sub-pixel) or "mse".
        pixel_scale, pixel_offset: a pixel in [0, 1] enters as ``x * pixel_scale + pixel_offset``.
        resample: filter that makes the tokenizer's view of an image.
    """

    channels: int = 3
    codes: int = 8192
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    blocks_per_group: int = 2
    kernel: int = 7
    code_width: int = 128
    likelihood: Literal["logit-laplace", "mse"] = "logit-laplace"
    pixel_scale: float = 0.8
    pixel_offset: float = 0.1
    resample: str = "lanczos"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        for name in ("channels", "codes", "blocks_per_group", "code_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.codes < 2:
            raise ValueError(f"codes must be at least 2, got {self.codes}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {self.kernel}")
        if not self.widths or any(width < 4 or width % 4 for width in self.widths):
            raise ValueError(f"widths must be positive multiples of 4, got {self.widths}")
        if self.likelihood not in ("logit-laplace", "mse"):
            raise ValueError(
                f"likelihood must be 'logit-laplace' or 'mse', got {self.likelihood!r}"
            )
        if self.pixel_scale <= 0:
            raise ValueError(f"pixel_scale must be positive, got {self.pixel_scale}")

    @property
    def stride(self) -> int:
        """Input pixels along one side of a token."""
        return 2 ** (len(self.widths) - 1)

    @property
    def residual_gain(self) -> float:
        """What a residual branch is multiplied by: 1 / (number of blocks) squared."""
        return 1.0 / (len(self.widths) * self.blocks_per_group) ** 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DvaeConfig:
        """The inverse of ``to_dict``. ValueError names unknown fields."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown tokenizer settings {unknown}: written by a newer fastbeit?")
        return cls(**values)


class Conv(nn.Module):
    """A convolution that keeps the size (odd kernel, stride 1), weight ``w`` and bias ``b``."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.b = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """x -> id(x) + gain * branch(x); the branch is four (ReLU, convolution) at a quarter width."""

    def __init__(self, inputs: int, width: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = Conv(inputs, width, 1) if inputs != width else None
        hidden = width // 4
        sizes = [inputs] + [hidden] * (len(kernels) - 1) + [width]
        self.res_path = nn.ModuleDict(
            {
                f"conv_{i + 1}": Conv(sizes[i], sizes[i + 1], kernel)
                for i, kernel in enumerate(kernels)
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for conv in self.res_path.values():
            branch = conv(F.relu(branch))
        identity = x if self.id_path is None else self.id_path(x)
        return torch.add(identity, branch, alpha=self.gain)


def _groups(
    inputs: int, widths: tuple[int, ...], config: DvaeConfig, kernels: tuple[int, ...]
) -> dict[str, nn.Module]:
    groups: dict[str, nn.Module] = {}
    for number, width in enumerate(widths, 1):
        group = nn.ModuleDict()
        for block in range(1, config.blocks_per_group + 1):
            group[f"block_{block}"] = Block(inputs, width, kernels, config.residual_gain)
            inputs = width
        groups[f"group_{number}"] = group
    return groups


class Encoder(nn.Module):
    """Images to code logits: 7 x 7 convolution, groups of blocks with max-pooling between, head."""

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleDict(
            {
                "input": Conv(config.channels, config.widths[0], config.kernel),
                **_groups(config.widths[0], config.widths, config, kernels=(3, 3, 3, 1)),
                "output": nn.ModuleDict({"conv": Conv(config.widths[-1], config.codes, 1)}),
            }
        )

    @property
    def head(self) -> Conv:
        """The 1 x 1 convolution D -> V."""
        return self.blocks["output"]["conv"]  # type: ignore[index,return-value]

    def features(self, images_BCHW: Tensor) -> Tensor:
        """What the head reads, after its ReLU: [B, D, h, w]."""
        x = self.blocks["input"](images_BCHW)
        for number in range(1, len(self.config.widths) + 1):
            if number > 1:
                x = F.max_pool2d(x, 2)
            for block in self.blocks[f"group_{number}"].values():  # type: ignore[operator]
                x = block(x)
        return F.relu(x)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, V, h, w] of mapped pixels [B, C, H, W]."""
        return self.head(self.features(images_BCHW))


class Decoder(nn.Module):
    """Codes to pixels: code embeddings, groups of blocks with nearest 2 x upsampling between."""

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        self.config = config
        outputs = config.channels * (2 if config.likelihood == "logit-laplace" else 1)
        widths = config.widths[::-1]
        self.blocks = nn.ModuleDict(
            {
                "input": Conv(config.codes, config.code_width, 1),
                **_groups(config.code_width, widths, config, kernels=(1, 3, 3, 3)),
                "output": nn.ModuleDict({"conv": Conv(widths[-1], outputs, 1)}),
            }
        )

    @property
    def embedding(self) -> Conv:
        """The 1 x 1 convolution V -> code_width that reads one-hot (or relaxed) codes."""
        return self.blocks["input"]  # type: ignore[return-value]

    def embed(self, codes_Bhw: Tensor) -> Tensor:
        """The first convolution of one-hot codes, as a gather: [B, code_width, h, w]."""
        table_VE = self.embedding.w[:, :, 0, 0].T
        return (F.embedding(codes_Bhw, table_VE) + self.embedding.b).permute(0, 3, 1, 2)

    def from_embeddings(self, x_BEhw: Tensor) -> Tensor:
        """Output statistics [B, C or 2 C, H, W] of code embeddings [B, code_width, h, w]."""
        x = x_BEhw
        groups = len(self.config.widths)
        for number in range(1, groups + 1):
            for block in self.blocks[f"group_{number}"].values():  # type: ignore[operator]
                x = block(x)
            if number < groups:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.blocks["output"]["conv"](F.relu(x))  # type: ignore[index]

    def forward(self, relaxed_BVhw: Tensor) -> Tensor:
        """Output statistics of (relaxed) one-hot codes [B, V, h, w]."""
        return self.from_embeddings(self.embedding(relaxed_BVhw))

    def pixels(self, output: Tensor) -> Tensor:
        """The image [B, C, H, W] in [0, 1] that output statistics stand for."""
        mapped = output[:, : self.config.channels].float()
        if self.config.likelihood == "logit-laplace":
            mapped = mapped.sigmoid()  # the median of a logit-Laplace variable
        return ((mapped - self.config.pixel_offset) / self.config.pixel_scale).clamp(0, 1)


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Weights from N(0, 1 / fan-in), biases zero (as published), in the order of the modules."""
    for module in network.modules():
        if isinstance(module, Conv):
            fan_in = module.w[0].numel()
            with torch.no_grad():
                module.w.normal_(0.0, fan_in**-0.5, generator=generator)
                module.b.zero_()
