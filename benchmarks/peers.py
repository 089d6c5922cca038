"""What peers of every operation share: imports that may fail, and torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.call import Call, Function, Outputs


class Unavailable(RuntimeError):
    """A peer that can't take part, with the reason for its row."""


def imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken build may raise anything
        raise Unavailable(f"import {module}: {type(error).__name__}: {error}") from error


def plainly(function: Function) -> Callable[[Any], Function]:
    """A form that is one function for every shape."""
    return lambda _shape: function


def compiler(device_type: str) -> Callable[[Callable[..., Any]], Any]:
    """torch.compile as the peers get it. CUDA graphs are left out: the timer hides launch costs
    from nobody, and a graph's outputs are overwritten by its next run."""
    import torch._functorch.config as functorch_config

    settings: Any = functorch_config
    # A backward that is timed by itself runs many times on one saved graph.
    settings.donated_buffer = False
    # Every problem compiles the same Python functions again; beyond the limit they would be run
    # uncompiled (fullgraph makes that an error).
    limits: Any = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit = 1000
    how: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"}
    if device_type == "cpu":
        how = {"backend": "aot_eager"}
    return lambda function: torch.compile(function, fullgraph=True, dynamic=False, **how)


def compiled(form: Callable[[Any], Function]) -> Callable[[Any], Function]:
    """max-autotune of another form, from leaves to outputs."""

    def build(shape: Any) -> Function:
        plain = form(shape)
        function = None

        def flat(leaves: dict[str, Tensor], given: dict[str, Tensor]) -> Outputs:
            # Gradients of outputs are no input of a forward.
            return plain(Call(shape, leaves, given))

        def run(call: Call) -> Outputs:
            nonlocal function
            if function is None:
                device = next(iter({**call.leaves, **call.given}.values())).device
                function = compiler(device.type)(flat)
            return function(call.leaves, call.given)

        return run

    return build
