"""GELU with the bias of the product before it."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .._checks import check_tensor, rows_unfit
from .._dispatch import Impl, choose


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """GELU(x + bias), the exact one (by erf).

    Give the first linear layer of an MLP no bias, and its bias to this: the backward kernel sums
    dbias on its way, where autograd would read the gradient a second time.

    Args:
        x: ``[..., N]``.
        bias: ``[N]`` or None, in a dtype of its own. It is added in fp32 by the kernels, and by the
            reference in the wider of the two dtypes.

    Returns:
        ``[..., N]`` in x's dtype.
    """
    dims = x.dim() if isinstance(x, Tensor) else 1
    check_tensor("x", x, (*(None,) * (dims - 1), "N"))
    if bias is not None:
        check_tensor("bias", bias, (x.shape[-1],), like=x)
    match choose("bias_gelu", impl, x, rows_unfit(x=x, bias=bias)):
        case "triton":
            from .._gelu import ops

            return ops.bias_gelu(x, bias)
        case "reference":
            return reference.bias_gelu(x, bias)
