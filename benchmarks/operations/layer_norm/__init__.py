"""scale_residual_layer_norm and scale_residual: what is checked, timed and wanted of them."""

from __future__ import annotations

from benchmarks.judge import judge_in_own_precision
from benchmarks.operation import Case, Operation, Problem
from benchmarks.operations.layer_norm.peers import PEERS, ours
from benchmarks.operations.layer_norm.shapes import Norm, by_definition
from benchmarks.targets import OfCopy, Target

# In order of worth.
CASES = (
    Case(
        "LayerNorm of BEiT-B",
        "a block's whole work: branch, gamma, drop factors with zeros",
        Norm(3, 197, 768),
        machinery=True,
        sanitized=True,
    ),
    Case(
        "LayerNorm of BEiT-B at full size",
        "every partial sum of the parameters' gradients",
        Norm(128, 197, 768),
        ("bfloat16",),
        1,
    ),
    Case("LayerNorm alone", "the first norm and the last", Norm(3, 197, 768, branch=False)),
    Case("residual alone", "no norm behind it", Norm(3, 197, 768, norm=False)),
    Case("LayerNorm of BEiT-L", "1,024 wide: a power of two", Norm(2, 197, 1024)),
    Case("LayerNorm, odd width", "rows of 777 start anywhere", Norm(3, 11, 777), sanitized=True),
    Case("LayerNorm of one row", "nothing to sum over", Norm(1, 1, 768, drop=False)),
    Case("LayerNorm without gamma", "folded into the weight before", Norm(3, 50, 768, gamma=False)),
    Case("LayerNorm without drop", "validation", Norm(3, 50, 768, drop=False)),
    Case("LayerNorm, plain sum", "neither", Norm(3, 50, 768, gamma=False, drop=False)),
    Case("LayerNorm without bias", "some ViTs have none", Norm(3, 50, 768, bias=False)),
    Case(
        "LayerNorm, fp32 stream",
        "a 16-bit branch added to an fp32 stream",
        Norm(3, 197, 768, stream="float32"),
        ("bfloat16", "float16"),
    ),
    Case(
        "LayerNorm, large mean",
        "E[x²] - E[x]² would cancel",
        Norm(3, 50, 768, branch=False, mean=100.0),
    ),
    Case("LayerNorm, narrow", "less than a warp", Norm(2, 300, 20)),
    Case("LayerNorm, wide", "8,192: the largest tiles", Norm(2, 9, 8192)),
)

RESIDUAL = Problem("BEiT-B, residual + LayerNorm", Norm(128, 197, 768), worth=0)
# In order of worth.
PROBLEMS = (
    RESIDUAL,
    Problem("BEiT-B, LayerNorm alone", Norm(128, 197, 768, branch=False), worth=0),
    Problem("BEiT-L, residual + LayerNorm", Norm(64, 197, 1024)),
    Problem("BEiT-B, residual alone", Norm(128, 197, 768, norm=False), worth=2),
)

_FUSED = "residual + LayerNorm"
TARGETS: tuple[Target, ...] = (
    OfCopy(f"{_FUSED} forward: 85 % of the copy's bandwidth", RESIDUAL.name, "forward", 0.85),
    OfCopy(
        f"{_FUSED} backward, reduction included: 75 % of the copy's bandwidth",
        RESIDUAL.name,
        "backward",
        0.75,
    ),
)

OPERATION = Operation(
    name="residual and LayerNorm",
    about="y = x + drop·γ·branch and LayerNorm(y), either alone, and all gradients",
    ours=ours,
    definition=by_definition,
    cases=CASES,
    problems=PROBLEMS,
    peers=PEERS,
    targets=TARGETS,
    share=0.16,
    judge=judge_in_own_precision,
)
