"""Which implementation the model's operations take.

Given to a model when it is built and to no configuration: what weights mean doesn't depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastbeit_kernels import Impl


@dataclass(frozen=True)
class Backends:
    """Handed to every module that calls a kernel.

    Attributes:
        kernels: ``impl`` of every operation of ``fastbeit_kernels``: "auto", "triton" (an error
            where it can't run) or "reference".
    """

    kernels: Impl = "auto"


AUTO = Backends()
