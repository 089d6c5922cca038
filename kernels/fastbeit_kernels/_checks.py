"""Argument checks of the public functions: what was expected, what came, what to do."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNEL_FLOATS = FLOATS[:3]
KERNEL_HEAD_WIDTH = 128
KERNEL_CLASSES = 65_536
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8)
IMPLEMENTATIONS = ("auto", "triton", "reference")


def check_impl_name(operation: str, impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operation}: impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}"
        )


def attention_unfit(q: Tensor, k: Tensor) -> str | None:
    """Why the attention kernels can't take such q and k; None if they can."""
    if q.dtype not in KERNEL_FLOATS:
        return f"the kernels take float32, float16 and bfloat16, and q is {q.dtype}"
    if q.shape[-1] > KERNEL_HEAD_WIDTH:
        return f"the kernels take head widths up to {KERNEL_HEAD_WIDTH}, and q has {q.shape[-1]}"
    if q.numel() == 0 or k.numel() == 0:
        return "there is nothing to compute: q, k or v is empty"
    return None


def expand_unfit(table: Tensor, index: Tensor) -> str | None:
    if table.dtype not in KERNEL_FLOATS:
        return f"the kernels take float32, float16 and bfloat16, and table is {table.dtype}"
    if table.numel() == 0 or index.numel() == 0:
        return "there is nothing to compute: table or index is empty"
    return None


def rows_unfit(**tensors: Tensor | None) -> str | None:
    """Why kernels that go through rows can't take these tensors, by name; None if they can."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in KERNEL_FLOATS:
            return f"the kernels take float32, float16 and bfloat16, and {name} is {tensor.dtype}"
        if tensor.numel() == 0:
            return f"there is nothing to compute: {name} is empty"
    return None


def classes_unfit(weight: Tensor) -> str | None:
    if weight.shape[0] > KERNEL_CLASSES:
        return f"the kernels take up to {KERNEL_CLASSES} classes, and weight has {weight.shape[0]}"
    return None


def embedding_unfit(images: Tensor, weight: Tensor) -> str | None:
    if images.requires_grad:
        return "the kernels give images no gradient, and images requires one"
    return rows_unfit(images=images, weight=weight)


def _words(shape: tuple[int | str | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | str | None, ...],
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    like: Tensor | None = None,
) -> None:
    """Refuse another shape, dtype or device. A str or None in ``shape`` fits any size."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {_words(shape)}, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        not isinstance(wanted, int) or wanted == size
        for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must be {_words(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must have one of the dtypes {wanted}, got {tensor.dtype}")
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the other arguments are on {like.device}; move it there"
        )


def check_same_dtype(**tensors: Tensor) -> None:
    """Refuse tensors of different dtypes, naming each."""
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        came = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise ValueError(f"{', '.join(tensors)} must have one dtype, got {came}")


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, query_positions: Tensor | None
) -> None:
    check_tensor("q", q, ("B", "Tq", "H", "d"))
    batch, queries, heads, width = q.shape
    check_tensor("k", k, (batch, "Tk", heads, width), like=q)
    keys = k.shape[1]
    check_tensor("v", v, (batch, keys, heads, width), like=q)
    check_same_dtype(q=q, k=k, v=v)
    if query_positions is not None:
        check_tensor("query_positions", query_positions, (batch, queries), dtypes=INTEGERS, like=q)
        if bias is not None:
            check_tensor("bias (with query_positions)", bias, (heads, "T", keys), like=q)
    elif bias is not None:
        if bias.dtype not in FLOATS or bias.device != q.device:
            raise ValueError(
                f"bias must be floating point on {q.device}, got {bias.dtype} on {bias.device}"
            )
        wanted = (batch, heads, queries, keys)
        sizes = zip(reversed(bias.shape), reversed(wanted), strict=False)
        if bias.dim() > 4 or any(size not in (1, full) for size, full in sizes):
            raise ValueError(
                f"bias must be broadcastable to [B, H, Tq, Tk] = {list(wanted)}, "
                f"got {list(bias.shape)}"
            )


def check_relative(
    table: Tensor, index: Tensor, grid: tuple[int, int] | None, heads: int | None = None
) -> None:
    check_tensor("table", table, ("R", heads))
    check_tensor("index", index, ("T", "T"), dtypes=INTEGERS, like=table)
    tokens = index.shape[0]
    if index.shape[1] != tokens:
        raise ValueError(f"index must be square [T, T], got {list(index.shape)}")
    if grid is not None and grid[0] * grid[1] + 1 != tokens:
        raise ValueError(
            f"grid {grid[0]}x{grid[1]} has {grid[0] * grid[1] + 1} tokens with CLS, "
            f"but index is for {tokens}"
        )
