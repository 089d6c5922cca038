"""Which implementation the model's operations take.

Given to a model when it is built and to no configuration: what weights mean doesn't depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastbeit_kernels import Impl

AttentionName = Literal["auto", "triton", "sdpa", "flex", "xformers", "reference"]


@dataclass(frozen=True)
class Backends:
    """Handed to every module that calls a kernel.

    Attributes:
        kernels: ``impl`` of every operation of ``fastbeit_kernels``: "auto", "triton" (an error
            where it can't run) or "reference".
        attention: who computes attention (``attention_backends.py``); "auto" is ``kernels``.
    """

    kernels: Impl = "auto"
    attention: AttentionName = "auto"

    @property
    def attention_name(self) -> AttentionName:
        """The attention backend, "auto" only where ``kernels`` is."""
        return self.kernels if self.attention == "auto" else self.attention


AUTO = Backends()
