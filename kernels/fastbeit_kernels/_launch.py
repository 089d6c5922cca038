"""A kernel launch as data: operators run it, the compile report compiles what it describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One kernel launch: ``arguments`` are tensors and numbers, ``constants`` are compiled in."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    grid: int
    warps: int
    stages: int

    def run(self) -> None:
        self.kernel[(self.grid,)](
            **self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages
        )
