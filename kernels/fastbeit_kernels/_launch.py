"""A kernel launch as data: operators run it, the compile report compiles what it describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One kernel launch: ``arguments`` are tensors and numbers, ``constants`` are compiled in.

    ``maxnreg``: the most registers a thread may have; None leaves the number to the compiler. A
    kernel a few registers over 128 fits a multiprocessor once with 256 threads, and twice under
    the cap.
    """

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    grid: int
    warps: int
    stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, Any]:
        """What the compiler is told, at a launch and by whoever compiles without launching.

        Products and sums may fuse (FFMA), as Triton up to 3.9 does unasked; 3.10 is to stop, and
        3.9 warns where nothing is said.
        """
        options = {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}

    def run(self) -> None:
        self.kernel[(self.grid,)](**self.arguments, **self.constants, **self.options())
