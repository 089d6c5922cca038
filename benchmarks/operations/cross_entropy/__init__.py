"""masked_linear_cross_entropy: what is checked, timed and wanted of it."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.operation import Case, Operation, Problem
from benchmarks.operations.cross_entropy.peers import PEERS, ours
from benchmarks.operations.cross_entropy.shapes import Head, by_definition, empty_slots, judge_loss
from benchmarks.targets import AtMost, KernelOfCopy, Target

_BEIT = Head(4, 197, 75, 768, 8192)
# In order of worth.
CASES = (
    Case("loss of BEiT-B", "8,192 classes, empty slots", _BEIT, machinery=True),
    Case(
        "loss of BEiT-B at full size",
        "75 of 197 rows of 128 images",
        replace(_BEIT, batch=128),
        ("bfloat16",),
        1,
    ),
    Case("loss, rows selected", "no positions", replace(_BEIT, positions=False)),
    Case("loss, label smoothing", "a share for every class", replace(_BEIT, smoothing=0.1)),
    Case(
        "loss, repeated positions",
        "gradients of a row are summed, in a fixed order",
        Head(3, 50, 20, 256, 1000, repeated=True),
        sanitized=True,
    ),
    Case("loss, 1,000 classes", "no power of two", Head(3, 50, 40, 768, 1000)),
    Case("loss, 10 classes", "fewer than a warp", Head(3, 50, 40, 768, 10), sanitized=True),
    Case("loss, 65,536 classes", "the most there are", Head(2, 50, 30, 256, 65_536), seeds=1),
    Case("loss, no filled slot", "zero, and no NaN", Head(2, 50, 20, 256, 1000, empty="all")),
    Case(
        "loss, extreme logits",
        "a softmax that saturates: no overflow, no NaN",
        Head(3, 50, 40, 256, 1000, scale=300.0),
    ),
    Case("loss without bias", "some heads have none", Head(3, 50, 40, 256, 1000, bias=False)),
    Case("loss of BEiT-L", "1,024 wide", Head(2, 197, 75, 1024, 8192)),
)

_B = Head(128, 197, 75, 768, 8192, empty="none")
_L = Head(64, 197, 75, 1024, 8192, empty="none")
# Logits read and their gradient written over them, in 16 bits.
CROSS_ENTROPY = "loss_whole_rows"


def _problem(name: str, shape: Head, worth: int = 1) -> Problem:
    moved = {CROSS_ENTROPY: 2 * shape.rows * shape.classes * 2}
    return Problem(name, shape, passes=("both", "no gradient"), worth=worth, kernel_bytes=moved)


HEAD = _problem("BEiT-B, masked head's loss", _B, 0)
# In order of worth.
PROBLEMS = (
    HEAD,
    _problem("BEiT-B, masked head's loss, rows selected", replace(_B, positions=False), 0),
    _problem("BEiT-L, masked head's loss", _L),
)

TARGETS: tuple[Target, ...] = (
    AtMost(
        "masked head's loss, forward and backward, 128 images: at most 0.75 ms",
        HEAD.name,
        "both",
        750.0,
    ),
    KernelOfCopy(
        "its cross-entropy pass: 85 % of the copy's bandwidth", HEAD.name, CROSS_ENTROPY, 0.85
    ),
)

OPERATION = Operation(
    name="masked head's loss",
    about="cross-entropy of a linear head at masked rows, right answers counted, and all gradients",
    ours=ours,
    definition=by_definition,
    cases=CASES,
    problems=PROBLEMS,
    peers=PEERS,
    targets=TARGETS,
    share=0.16,
    cast=frozenset({"hidden", "weight", "bias"}),
    checks={"empty slots": empty_slots},
    judge=judge_loss,
)
