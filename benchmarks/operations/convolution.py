"""conv2d_channels_last and conv2d_pointwise_channels_last: everything about them.

Convolutions of a frozen network, so nothing takes a gradient. Shapes: B images, H×W pixels, C input
channels, N hidden ones, O outputs, k side of a filter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastbeit_kernels
from benchmarks.call import Call, Function, Outputs, define_in_parts
from benchmarks.judge import judge_in_own_precision
from benchmarks.operation import OURS, Case, Operation, Pass, Peer, Problem
from benchmarks.peers import compiled, plainly
from benchmarks.roofline import Work
from benchmarks.targets import Target

GAIN = 1 / 64
# Pixels times channels of the widest tensor that float64 computes at a time: half a GB.
TRUTH_ELEMENTS = 64_000_000


@dataclass(frozen=True)
class Convolution:
    """``hidden``: channels between a convolution and the 1×1 one behind it, or None for one alone.
    ``residual``: what the result, times GAIN, is added to."""

    batch: int
    side: int
    channels: int
    outputs: int
    kernel: int = 3
    hidden: int | None = None
    residual: bool = False
    relu_input: bool = False
    relu_output: bool = False
    width: int | None = None
    """Pixels of a row; None: as many as there are rows."""

    @property
    def across(self) -> int:
        return self.side if self.width is None else self.width

    def describe(self) -> str:
        middle = "" if self.hidden is None else f" → {self.hidden}"
        added = " + residual" if self.residual else ""
        filters = f"{self.kernel}×{self.kernel}"
        return (
            f"{self.batch}×{self.side}×{self.across}, {filters}, "
            f"{self.channels}{middle} → {self.outputs}{added}"
        )

    def shrunk(self) -> Convolution:
        def few(channels: int) -> int:
            return min(channels, 16 + channels % 5)

        return replace(
            self,
            batch=min(self.batch, 2),
            side=min(self.side, 5),
            width=min(self.across, 4),
            channels=few(self.channels),
            outputs=few(self.outputs),
            hidden=None if self.hidden is None else few(self.hidden),
        )

    def work(self, direction: Pass, dtype: torch.dtype) -> Work:
        """Input, filters and residual read once, output written once; nothing in between."""
        pixels = self.batch * self.side * self.across
        first = self.outputs if self.hidden is None else self.hidden
        filters = self.kernel**2 * self.channels * first + first
        multiplied = self.kernel**2 * self.channels * first
        if self.hidden is not None:
            filters += self.hidden * self.outputs + self.outputs
            multiplied += self.hidden * self.outputs
        moved = pixels * (self.channels + self.outputs * (2 if self.residual else 1)) + filters
        return Work(2 * pixels * multiplied, moved * dtype.itemsize)

    def make(self, dtype: torch.dtype, seed: int, device: torch.device) -> Call:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=device)
            return drawn.mul(scale).to(dtype)

        def filters(outputs: int, inputs: int, side: int) -> Tensor:
            drawn = normal(outputs, inputs, side, side, scale=(inputs * side**2) ** -0.5)
            return drawn.contiguous(memory_format=torch.channels_last)

        def pixels(channels: int) -> Tensor:
            # Dense channels-last memory under the shape [B, C, H, W].
            return normal(self.batch, self.side, self.across, channels).permute(0, 3, 1, 2)

        first = self.outputs if self.hidden is None else self.hidden
        given = {
            "x": pixels(self.channels),
            "weight": filters(first, self.channels, self.kernel),
            "bias": normal(first, scale=0.1),
        }
        if self.hidden is not None:
            given["pointwise_weight"] = filters(self.outputs, self.hidden, 1)
            given["pointwise_bias"] = normal(self.outputs, scale=0.1)
        if self.residual:
            given["residual"] = pixels(self.outputs)
        return Call(self, {}, given, {}, frozenset({"x", "residual", "out"}))


def gain_of(call: Call) -> float:
    return GAIN if "residual" in call.given else 1.0


def ours(impl: Any) -> Function:
    """The public functions of fastbeit_kernels."""

    def function(call: Call) -> Outputs:
        given, shape = call.given, call.shape
        more: dict[str, Any] = {
            "residual": given.get("residual"),
            "gain": gain_of(call),
            "relu_output": shape.relu_output,
            "impl": impl,
        }
        first = (given["x"], given["weight"], given["bias"])
        if shape.hidden is None:
            out = fastbeit_kernels.conv2d_channels_last(*first, relu_input=shape.relu_input, **more)
        else:
            out = fastbeit_kernels.conv2d_pointwise_channels_last(
                *first, given["pointwise_weight"], given["pointwise_bias"], **more
            )
        return {"out": out}

    return function


def by_definition(call: Call) -> Outputs:
    """A sum over the filter's taps, each a matrix product of shifted pixels, in fp32 at least; each
    convolution's result is rounded once, as PyTorch's is."""
    given, shape = call.given, call.shape
    x = given["x"].permute(0, 2, 3, 1)
    x = x.relu() if shape.relu_input and shape.hidden is None else x
    reach = shape.kernel // 2
    padded = F.pad(x, (0, 0, reach, reach, reach, reach))
    height, width = x.shape[1:3]
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, padded = given["weight"].to(wide), padded.to(wide)
    sums = given["bias"].to(wide).expand(*x.shape[:3], -1)
    for row in range(shape.kernel):
        for column in range(shape.kernel):
            shifted = padded[:, row : row + height, column : column + width]
            sums = sums + shifted @ weight[:, :, row, column].t()
    out = sums.to(x.dtype)
    if shape.hidden is not None:
        pointwise = given["pointwise_weight"][:, :, 0, 0]
        out = out.relu() @ pointwise.t() + given["pointwise_bias"]
    if "residual" in given:
        out = given["residual"].permute(0, 2, 3, 1) + GAIN * out
    out = out.relu() if shape.relu_output else out
    return {"out": out.permute(0, 3, 1, 2)}


def truth(definition: Function, call: Call) -> Outputs:
    shape = call.shape
    widest = max(shape.channels, shape.outputs, shape.hidden or 0)
    image = shape.side * shape.across * widest
    return define_in_parts(definition, call, max(1, TRUTH_ELEMENTS // image))


def eager(call: Call) -> Outputs:
    """Convolutions, ReLUs and the sum as separate calls, in channels-last memory (cuDNN's)."""
    given, shape = call.given, call.shape
    x = given["x"].relu() if shape.relu_input and shape.hidden is None else given["x"]
    out = F.conv2d(x, given["weight"], given["bias"], padding=shape.kernel // 2)
    if shape.hidden is not None:
        out = F.conv2d(out.relu(), given["pointwise_weight"], given["pointwise_bias"])
    if "residual" in given:
        out = torch.add(given["residual"], out, alpha=GAIN)
    return {"out": out.relu() if shape.relu_output else out}


PEERS = (
    Peer(OURS, plainly(ours("triton")), ours=True),
    Peer("eager PyTorch (cuDNN)", plainly(eager)),
    Peer("in place (reference)", plainly(ours("reference"))),
    Peer("torch.compile max-autotune", compiled(plainly(eager)), slow=True),
)

_NARROW = Convolution(2, 112, 64, 64, relu_output=True)
_TAIL = Convolution(2, 112, 64, 256, hidden=64, residual=True)
# In order of worth.
CASES = (
    Case("convolution at 112²", "the dVAE's first group, conv_2", _NARROW, machinery=True),
    Case("end of a block at 112²", "conv_3, conv_4 and the skip in one", _TAIL, machinery=True),
    Case(
        "first of a block at 112²",
        "256 channels in, ReLU before and behind",
        Convolution(2, 112, 256, 64, relu_input=True, relu_output=True),
    ),
    Case(
        "end of a block at 56²",
        "128 hidden channels",
        replace(_TAIL, side=56, channels=128, hidden=128, outputs=512),
    ),
    Case("skip of a group", "1×1 to other channels", Convolution(3, 56, 256, 512, kernel=1)),
    Case(
        "convolution, odd sizes",
        "channels no multiple of 8, rows longer than columns",
        Convolution(3, 9, 20, 37, width=14, relu_input=True, residual=True),
        sanitized=True,
    ),
    Case(
        "end of a block, odd sizes",
        "padded hidden channels",
        Convolution(2, 11, 12, 40, hidden=20, width=7, residual=True, relu_output=True),
        sanitized=True,
    ),
    Case("convolution of one pixel", "all taps but one outside", Convolution(1, 1, 16, 16)),
    Case("convolution 7×7", "three channels in", Convolution(2, 32, 3, 64, kernel=7)),
    Case(
        "end of a block at 112², batch of training",
        "offsets beyond 2**31 bytes",
        replace(_TAIL, batch=128),
        ("bfloat16",),
        1,
    ),
)

_B = 128
# In order of worth.
PROBLEMS = (
    Problem(
        "dVAE 112², conv_3 + conv_4 + skip",
        replace(_TAIL, batch=_B),
        passes=("forward",),
        worth=0,
    ),
    Problem("dVAE 112², conv_2", replace(_NARROW, batch=_B), passes=("forward",)),
    Problem(
        "dVAE 112², conv_1",
        Convolution(_B, 112, 256, 64, relu_input=True, relu_output=True),
        passes=("forward",),
    ),
    Problem(
        "dVAE 56², conv_3 + conv_4 + skip",
        Convolution(_B, 56, 128, 512, hidden=128, residual=True),
        passes=("forward",),
    ),
    Problem(
        "dVAE 56², conv_1",
        Convolution(_B, 56, 512, 128, relu_input=True, relu_output=True),
        passes=("forward",),
        worth=2,
    ),
)

# "Ahead of every peer" is all that is wanted of them; where cuDNN is ahead it stays.
TARGETS: tuple[Target, ...] = ()

OPERATION = Operation(
    name="frozen convolutions",
    about="convolution, bias, ReLU, gain and residual in one pass, a 1×1 one behind it too",
    ours=ours,
    definition=by_definition,
    cases=CASES,
    problems=PROBLEMS,
    peers=PEERS,
    targets=TARGETS,
    share=0.1,
    shares_tiles=True,
    truth=truth,
    judge=judge_in_own_precision,
)
