"""Attention with a trained bias, the expansion of the table, and both in a row."""

from __future__ import annotations

from benchmarks.call import Call, Function, Outputs, define_in_parts, results
from benchmarks.operation import Operation
from benchmarks.operations.attention import forms
from benchmarks.operations.attention.cases import CASES, PROBLEMS, TARGETS
from benchmarks.operations.attention.peers import BIASES, PEERS

# Scores in float64 of this many elements at a time (half a GB with what autograd keeps).
TRUTH_ELEMENTS = 16_000_000


def truth(definition: Function, call: Call) -> Outputs:
    shape = call.shape
    step = max(1, TRUTH_ELEMENTS // max(1, shape.heads * shape.queries * shape.keys))
    return define_in_parts(definition, call, step)


def empty_slots(function: Function, call: Call, mine: Outputs) -> str | None:
    """Empty slots are zero, and what lies in them changes nothing."""
    if "positions" not in call.given:
        return None
    empty = call.given["positions"] < 0
    if not (mine["out"][empty] == 0).all() or not (mine["dq"][empty] == 0).all():
        return "rows of empty slots are not zero"

    def spoil(name: str, tensor):
        if name not in ("q", "out"):
            return tensor
        tensor = tensor.clone()
        tensor[empty] = float("nan") if name == "q" else float("inf")
        return tensor

    spoiled = results(function, call.everything(spoil))
    changed = [name for name in spoiled if not spoiled[name].equal(mine[name])]
    return f"{', '.join(changed)} change with the contents of empty slots" if changed else ""


OPERATION = Operation(
    name="attention",
    about="softmax(QKᵀ/√d + bias) V with the bias's gradient, and the table that the bias is of",
    ours=forms.ours,
    definition=forms.by_definition,
    cases=CASES,
    problems=PROBLEMS,
    peers=PEERS,
    targets=TARGETS,
    share=0.32,
    cast=frozenset({"q", "k", "v", "qkv"}),
    refusable=BIASES,
    checks={"empty slots": empty_slots},
    truth=truth,
)
