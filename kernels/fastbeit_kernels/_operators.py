"""What all registered operators share: their namespace, and the refusal of second derivatives."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

# From the package's own name, so that a vendored copy under another name registers its own.
NAMESPACE = __name__.rsplit(".", 1)[0].replace(".", "_")


def refuse_second_derivative(operation: str, *backwards: Any) -> None:
    """Register that a custom operator, which computes a gradient, has none itself."""

    def refuse(ctx: Any, *_grads: Tensor | None) -> NoReturn:
        raise RuntimeError(
            f"{operation} has no second derivative on Triton; use impl='reference' for double "
            "backward"
        )

    for backward in backwards:
        backward.register_autograd(refuse)
