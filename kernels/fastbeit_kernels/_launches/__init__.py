"""Every kernel that training and evaluation launch, as data for the compile report.

``launches(family)`` builds the launches of BEiT-B and BEiT-L from meta tensors with the very code
that runs them, so that what is reported is what is run. Each comes with its arithmetic and traffic,
counted from the shapes:

    flops           of the formulas
    padded_flops    of the tiles that are computed, padding included
    hbm_bytes       every tensor once
    l2_bytes        what all programs read and write together

One module an operation, each with ``records(family)``. They import Triton, but need no GPU.
"""

from __future__ import annotations

from .record import Record

__all__ = ["Record", "launches"]


def launches(family: str) -> list[Record]:
    """All launches on a GPU of a family (``_configs.family_of``)."""
    from . import (
        attention,
        convolution,
        cross_entropy,
        embedding,
        gelu,
        layer_norm,
        linear_argmax,
        rel_pos_bias,
    )

    parts = (
        attention,
        rel_pos_bias,
        layer_norm,
        linear_argmax,
        convolution,
        cross_entropy,
        embedding,
        gelu,
    )
    return [record for part in parts for record in part.records(family)]
