"""Reading PTX: tensor-core instructions, and how many bytes each load of a tensor takes at once.

PTX registers are assigned in few places each, so the argument that an address comes from is found
by following what it is computed from.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

REGISTER = re.compile(r"%(?:rd|rs|r|p|f|fd|rq|b)\d+")
WARP_PRODUCT = re.compile(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)\.\S+")
GROUP_PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)\.\S+")
UNIT_PRODUCT = re.compile(r"tcgen05\.mma\.cta_group\S+")
GLOBAL_LOAD = re.compile(r"ld\.global\S*?(?:\.v(\d+))?\.[bfsu](\d+)\s.*?\[\s*(%rd\d+)")
ASYNC_COPY = re.compile(r"cp\.async\.c[ag]\.\S+\s*\[[^\]]*\]\s*,\s*\[\s*(%rd\d+)[^\]]*\],\s*(\w+)")
PARAMETER = re.compile(r"ld\.param\S*\s+(\{[^}]*\}|%\w+),\s*\[\w+?_param_(\d+)")


@dataclass(frozen=True)
class TensorInstructions:
    """Static counts. ``work`` is rows * columns * depth of all products of a block together,
    for mma and wgmma; tcgen05 keeps its shapes out of the instruction."""

    mma: int
    wgmma: int
    tcgen05: int
    work: int
    tf32: int


def tensor_instructions(ptx: str, warps: int) -> TensorInstructions:
    by_warp, by_group = WARP_PRODUCT.findall(ptx), GROUP_PRODUCT.findall(ptx)
    work = 0
    # Four warps issue one wgmma together.
    for found, issuers in ((by_warp, warps), (by_group, warps // 4)):
        work += issuers * sum(int(m) * int(n) * int(k) for m, n, k in found)
    tf32 = len(re.findall(r"mma\S*\.(?:tf32|kind::tf32)", ptx))
    return TensorInstructions(
        len(by_warp), len(by_group), len(UNIT_PRODUCT.findall(ptx)), work, tf32
    )


def barriers(ptx: str) -> int:
    """Instructions at which the warps of a block wait for one another."""
    return len(re.findall(r"\b(?:bar|barrier)\.(?:cta\.)?sync", ptx))


def loads(ptx: str, parameters: list[str]) -> dict[str, Counter[int]]:
    """For each pointer argument, how many load instructions take how many bytes a thread.

    Args:
        parameters: the kernel's run-time arguments in order.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    arguments: dict[str, str] = {}
    accesses: list[tuple[str, int]] = []
    for raw in ptx.splitlines():
        line = re.sub(r"^@!?%p\d+\s+", "", raw.strip())
        if not line or line.startswith((".", "/", "$", "{", "}")):
            continue
        if match := PARAMETER.match(line):
            number = int(match[2])
            if number < len(parameters):
                for register in REGISTER.findall(match[1]):
                    arguments[register] = parameters[number]
            continue
        if match := ASYNC_COPY.match(line):
            accesses.append((match[1], int(match[2], 0)))
            continue
        if match := GLOBAL_LOAD.match(line):
            accesses.append((match[3], int(match[1] or 1) * int(match[2]) // 8))
            continue
        if line.startswith(("ld.", "ldmatrix", "st.", "tcgen05", "wgmma", "mma")):
            continue
        registers = REGISTER.findall(line)
        if registers:
            sources[registers[0]].update(registers[1:])
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for address, size in accesses:
        for argument in _origin(address, sources, arguments):
            if argument.endswith("_ptr"):
                found[argument][size] += 1
    return dict(found)


def _origin(register: str, sources: dict[str, set[str]], arguments: dict[str, str]) -> set[str]:
    found, todo, seen = set(), [register], set()
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        if one in arguments:
            found.add(arguments[one])
        todo += sources.get(one, ())
    return found
