"""Reading Triton's intermediate code (TTIR and TTGIR, MLIR as text).

``Module`` knows which values a value is computed from, through loops and branches, so that one can
ask where a pointer comes from and what a product multiplies. Text is what all Triton versions have
in common; a construct that is not understood is an error, never a silent pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
RESULT = re.compile(r"^(%[\w.$-]+)(?::(\d+))?((?:, %[\w.$-]+)*) = (.*)$")
NAME = re.compile(r'^"?([a-z_]\w*(?:\.\w+)+)"?')
SHAPE = re.compile(r"(?:tensor|memdesc)<((?:\d+x)+)(!tt\.ptr<\w+|\w+)(?:>?, (#[\w.]+))?")
PRODUCTS = ("tt.dot", "tt.dot_scaled", "ttng.warp_group_dot", "ttng.tc_gen5_mma")
LOADS = ("tt.load", "ttg.async_copy_global_to_local")
ELEMENT_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "i64": 8, "f64": 8, "i8": 1, "i1": 1}


@dataclass(frozen=True)
class Operation:
    name: str
    results: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


@dataclass
class Region:
    """An open brace: of which operation, what it yields into."""

    kind: str
    results: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()


@dataclass
class Module:
    """The operations of a module, and for each value the values it may be computed from."""

    text: str
    operations: list[Operation] = field(default_factory=list)
    sources: dict[str, list[str]] = field(default_factory=dict)
    made_by: dict[str, Operation] = field(default_factory=dict)
    pointers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        regions: list[Region] = []
        functions = 0
        for raw in self.text.splitlines():
            line = re.sub(r" loc\(.*$", "", raw.strip()) if "tt.func" not in raw else raw.strip()
            if not line or line.startswith(("#", "//", "^", "module")):
                regions += [Region("module")] * line.startswith("module")
                continue
            if line.startswith("}"):
                region = regions.pop()
                if line.endswith("{"):
                    regions.append(region)
                continue
            if line.startswith("tt.func"):
                functions += 1
                if functions > 1:
                    raise ValueError("expected one function in a module of Triton, got another")
                self.pointers = dict(re.findall(r"(%[\w.$-]+): !tt\.ptr<(\w+)>", line))
                regions.append(Region("tt.func"))
                continue
            self._read(line, regions)

    def _read(self, line: str, regions: list[Region]) -> None:
        results: tuple[str, ...] = ()
        match = RESULT.match(line)
        if match:
            base, count, more, line = match.groups()
            results = tuple(f"{base}#{i}" for i in range(int(count))) if count else (base,)
            results += tuple(VALUE.findall(more))
        found = NAME.match(line)
        if not found:
            raise ValueError(f"expected an operation of MLIR, got {line[:100]!r}")
        name = found[1]
        operands = tuple(VALUE.findall(line))
        if name == "scf.while":
            raise ValueError("scf.while is not understood; write the kernel's loop as a range")
        self.operations.append(Operation(name, results, operands, line))
        region = Region(name, results)
        if name == "scf.for":
            pairs = re.search(r"iter_args\((.*?)\) ->", line)
            carried = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", pairs[1] if pairs else "")
            region.carried = tuple(inner for inner, _ in carried)
            for place, (inner, start) in enumerate(carried):
                self._add(inner, start)
                self._add(results[place], start)
        elif name == "scf.yield":
            into = regions[-1]
            for place, value in enumerate(operands):
                if into.carried:
                    self._add(into.carried[place], value)
                self._add(into.results[place], value)
        elif name != "scf.if":
            for result in results:
                self.made_by[result] = self.operations[-1]
                self.sources[result] = list(operands)
        if line.endswith(("{", "({")):
            regions.append(region)

    def _add(self, value: str, source: str) -> None:
        self.sources.setdefault(value, []).append(source)

    def named(self, *names: str) -> Iterator[Operation]:
        return (operation for operation in self.operations if operation.name in names)

    def origin(self, pointer: str) -> set[str]:
        """The kernel's pointer arguments that an address is computed from."""
        found, todo, seen = set(), [pointer], set()
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self.pointers:
                found.add(value.removeprefix("%"))
            made = self.made_by.get(value)
            # What was read from memory is a number, whatever it was read through.
            if made is None or made.name not in LOADS:
                todo += self.sources.get(value, [])
        return found


def shapes(text: str) -> list[tuple[tuple[int, ...], str, str]]:
    """(sides, element, layout) of each tensor or buffer that an operation's type names."""
    found = []
    for sides, element, layout in SHAPE.findall(text):
        numbers = tuple(int(side) for side in sides.rstrip("x").split("x"))
        found.append((numbers, element.removeprefix("!tt.ptr<"), layout))
    return found


def transposed_products(ttir: str) -> list[str]:
    """Products whose left side is the transpose of another product: ``dot(trans(cast(dot)), x)``.

    Triton up to 3.7.0 miscompiles them on Hopper (fla-org/flash-linear-attention#826). Anything
    between the two products counts but loads and reductions, whose results don't lie in registers
    as a product's do.
    """
    module = Module(ttir)
    found = []
    for product in module.named(*PRODUCTS):
        todo, seen = [(product.operands[0], False)], set()
        while todo:
            value, transposed = todo.pop()
            if (value, transposed) in seen:
                continue
            seen.add((value, transposed))
            made = module.made_by.get(value)
            if made is not None and made.name in PRODUCTS:
                if transposed:
                    found.append(f"{product.results[0]} multiplies the transpose of {value}")
                continue
            if made is not None and made.name in (*LOADS, "tt.reduce"):
                continue
            turned = transposed or (made is not None and made.name == "tt.trans")
            todo += [(source, turned) for source in module.sources.get(value, [])]
    return found


def precisions(ttir: str) -> list[tuple[str, str]]:
    """(element, input precision) of each product as it was written; "ieee" if nothing is said."""
    found = []
    for product in Module(ttir).named(*PRODUCTS):
        said = re.search(r"inputPrecision = (\w+)", product.text)
        found.append((shapes(product.text)[0][1], said[1] if said else "ieee"))
    return found
