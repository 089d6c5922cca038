"""Who normalises: ours, PyTorch, and libraries that have a LayerNorm.

None of those libraries adds the residual in the same kernel, so PyTorch does it before them, in its
one operator for it; that is the work that a model has to do with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastbeit_kernels
from benchmarks.call import Call, Function, Outputs
from benchmarks.operation import OURS, Peer
from benchmarks.operations.layer_norm.shapes import EPS, Norm
from benchmarks.peers import Unavailable, compiled, imported, plainly

# (y [B, T, D], weight, bias) -> normed
Normalise = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(impl: Any) -> Function:
    """The public functions of fastbeit_kernels."""

    def function(call: Call) -> Outputs:
        leaves, branch = call.leaves, call.leaves.get("branch")
        scales = {"gamma": leaves.get("gamma"), "drop_scale": call.given.get("drop_scale")}
        if not call.shape.norm:
            assert branch is not None
            return {"y": fastbeit_kernels.scale_residual(leaves["x"], branch, **scales, impl=impl)}
        y, normed = fastbeit_kernels.scale_residual_layer_norm(
            leaves["x"],
            branch,
            weight=leaves["weight"],
            bias=leaves.get("bias"),
            eps=EPS,
            **scales,
            impl=impl,
        )
        return {"normed": normed} if branch is None else {"y": y, "normed": normed}

    return function


def summed(call: Call) -> Tensor:
    """x + drop·γ·branch by `addcmul`: one kernel behind a small one, the best of eager PyTorch."""
    x, branch = call.leaves["x"], call.leaves.get("branch")
    if branch is None:
        return x
    factor, drop = call.leaves.get("gamma"), call.given.get("drop_scale")
    if drop is not None:
        drop = drop.to(x.dtype)[:, None, None]
        factor = drop if factor is None else drop * factor
    return x + branch if factor is None else torch.addcmul(x, branch, factor)


def with_norm(normalise: Normalise) -> Function:
    def function(call: Call) -> Outputs:
        y = summed(call)
        outputs = {"y": y} if call.shape.branch else {}
        if call.shape.norm:
            outputs["normed"] = normalise(y, call.leaves["weight"], call.leaves["bias"])
        return outputs

    return function


def torch_norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(y, (y.shape[-1],), weight, bias, EPS)


def step_by_step(call: Call) -> Outputs:
    """As timm writes it: LayerScale, DropPath, sum and norm, each an operator."""
    x, branch, drop = call.leaves["x"], call.leaves.get("branch"), call.given.get("drop_scale")
    y = x
    if branch is not None:
        branch = branch * call.leaves["gamma"] if "gamma" in call.leaves else branch
        branch = branch if drop is None else branch * drop.to(x.dtype)[:, None, None]
        y = x + branch
    outputs = {"y": y} if branch is not None else {}
    if call.shape.norm:
        outputs["normed"] = torch_norm(y, call.leaves["weight"], call.leaves["bias"])
    return outputs


def liger(_shape: Norm) -> Function:
    library = imported("liger_kernel.transformers.functional")
    return with_norm(lambda y, weight, bias: library.liger_layer_norm(y, weight, bias, EPS))


def apex(shape: Norm) -> Function:
    try:
        imported("fused_layer_norm_cuda")
    except Unavailable as error:
        reason = (
            "NVIDIA's apex is built from source (PyPI's package of that name is another project)"
        )
        raise Unavailable(f"{reason}: {error}") from error
    library = imported("apex.normalization.fused_layer_norm")

    def normalise(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return library.fused_layer_norm_affine(y, weight, bias, (shape.width,), EPS)

    return with_norm(normalise)


def quack(_shape: Norm) -> Function:
    """Its kernels come without an autograd function, and with fp32 parameters."""
    library = imported("quack.rmsnorm")
    missing = [name for name in ("layernorm_fwd", "layernorm_bwd") if not hasattr(library, name)]
    if missing:
        raise Unavailable(f"this quack has no {' and no '.join(missing)} in quack.rmsnorm")

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            rows, wide = y.flatten(0, -2), weight.float()
            out, rstd, mean = library.layernorm_fwd(
                rows, wide, bias.float(), EPS, return_rstd=True, return_mean=True
            )
            ctx.save_for_backward(rows, wide, rstd, mean)
            ctx.dtype = weight.dtype
            return out.view_as(y)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            (dout,) = grads
            rows, wide, rstd, mean = ctx.saved_tensors
            dx, dw, db = library.layernorm_bwd(
                rows, wide, dout.flatten(0, -2).contiguous(), rstd, mean, has_bias=True
            )
            return dx.view_as(dout), dw.to(ctx.dtype), db.to(ctx.dtype)

    def normalise(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = LayerNorm.apply(y, weight, bias)
        assert isinstance(out, Tensor)
        return out

    return with_norm(normalise)


def norms(shape: Norm) -> bool:
    return shape.norm


PEERS = (
    Peer(OURS, plainly(ours("triton")), ours=True),
    Peer("eager PyTorch", plainly(step_by_step)),
    Peer("addcmul and layer_norm", plainly(with_norm(torch_norm))),
    Peer("Liger LayerNorm", liger, fits=norms),
    Peer("quack LayerNorm", quack, fits=norms),
    Peer("apex FusedLayerNorm", apex, fits=norms),
    Peer("torch.compile max-autotune", compiled(plainly(step_by_step)), slow=True),
)
