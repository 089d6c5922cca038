"""A launch as the compile report sees it: compiler arguments, counted arithmetic and traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._launch import Launch

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Record:
    """A launch with what its compilation needs, and what it computes and moves."""

    name: str
    dtype: str
    launch: Launch
    flops: int
    padded_flops: int
    hbm_bytes: int
    l2_bytes: int

    def signature(self) -> dict[str, str]:
        """Type of each argument as ``triton.compiler.ASTSource`` takes it, in their order."""
        return {name: self._type(name) for name in self.launch.kernel.arg_names}

    def constants(self) -> dict[str, Any]:
        """Compile-time values: the kernel's own, and integers of one, which Triton folds in."""
        ones = {name: value for name, value in self.launch.arguments.items() if _is_one(value)}
        return {**self.launch.constants, **ones}

    def divisible_by_16(self) -> list[str]:
        """Arguments known to be multiples of 16 (pointers: bytes), as at a launch."""
        found = []
        for name, value in self.launch.arguments.items():
            whole = isinstance(value, int) and not _is_one(value) and value % 16 == 0
            if isinstance(value, Tensor) or whole:
                found.append(name)
        return found

    def source_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``triton.compiler.ASTSource``."""
        names = list(self.launch.kernel.arg_names)
        return {
            "fn": self.launch.kernel,
            "signature": self.signature(),
            "constexprs": {(names.index(name),): value for name, value in self.constants().items()},
            "attrs": {
                (names.index(name),): [["tt.divisibility", 16]] for name in self.divisible_by_16()
            },
        }

    def _type(self, name: str) -> str:
        if name in self.constants():
            return "constexpr"
        value = self.launch.arguments[name]
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
