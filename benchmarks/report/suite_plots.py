"""The suites' figures. Each says which rows it needs, and is drawn from nothing else."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.report.drawing import BETTER, COLOURS, OTHERS, OURS, REFERENCE, WORSE, figure
from benchmarks.suite_rows import AGAIN, Key, Row, SuiteRun, over

FAST, KERNELS = "fast", "kernels"
LEVERS = "levers"
LEAST_SHARE = 0.03
"""Of a step: a smaller part goes into its phase's "other" slice."""


@dataclass(frozen=True)
class Plot:
    """``rows`` of a run are what the figure shows; with none it isn't drawn."""

    name: str
    title: str
    about: str
    rows: Callable[[SuiteRun], list[tuple[Key, Row]]]
    draw: Callable[[SuiteRun], Any]

    def can_draw(self, run: SuiteRun) -> bool:
        return bool(self.rows(run))


def measured(run: SuiteRun, *suites: str) -> list[tuple[Key, Row]]:
    return [
        (key, row)
        for key, row in run.rows.items()
        if row["status"] == "ok" and (not suites or key.suite in suites)
    ]


def _counted(run: SuiteRun) -> list[tuple[Key, Row]]:
    return [(key, row) for key, row in measured(run) if row.get("flops") and row.get("bytes")]


def roofline(run: SuiteRun) -> Any:
    """GFLOP/s over FLOP a byte, below what a matrix product and a copy reach."""
    picture = figure(9, 5.5)
    axes = picture.add_subplot()
    rows = _counted(run)
    suites = list(dict.fromkeys(key.suite for key, _ in rows))
    for key, row in rows:
        colour = COLOURS[suites.index(key.suite) % len(COLOURS)]
        filled = key.path in (FAST, KERNELS)
        axes.plot(
            row["flops"] / row["bytes"],
            1e3 * row["tflops"],
            marker="o" if filled or key.path == "reference" else "x",
            color=colour,
            markerfacecolor=colour if filled else "none",
            linestyle="none",
        )
    ceilings = run.environment.get("ceilings") or {}
    ridges = [limit["tflops"] / limit["tb_per_s"] for limit in ceilings.values()]
    places = [row["flops"] / row["bytes"] for _, row in rows] + ridges
    left, right = min(places) / 3, max(places) * 3
    for number, ((dtype, limit), ridge) in enumerate(zip(ceilings.items(), ridges, strict=True)):
        axes.plot(
            [left, ridge, right],
            [1e3 * limit["tb_per_s"] * left, 1e3 * limit["tflops"], 1e3 * limit["tflops"]],
            color="black",
            linewidth=1,
            linestyle=("-", "--", ":", "-.")[number % 4],
            label=f"limit, {dtype}",
        )
    for suite in suites:
        colour = COLOURS[suites.index(suite) % len(COLOURS)]
        axes.plot([], [], marker="s", linestyle="none", color=colour, label=suite)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte, counted", ylabel="GFLOP/s")
    axes.legend(fontsize=7)
    axes.set_title(run.machine, fontsize=9)
    return picture


def _levers(run: SuiteRun) -> list[tuple[Key, Row]]:
    return [(key, row) for key, row in measured(run, LEVERS) if key.path != AGAIN]


def waterfall(run: SuiteRun) -> Any:
    """Milliseconds of a step as one lever after another is switched on."""
    rows = _levers(run)
    # By the ratios: what was run in turn with the reference is told by that.
    times = [rows[0][1]["ms"] * over(row, rows[0][1], run.rows).value for _, row in rows]
    picture = figure(9, 0.6 * len(rows) + 1.8)
    axes = picture.add_subplot()
    axes.barh("reference", times[0], color=REFERENCE)
    axes.text(times[0], 0, f" {times[0]:,.0f} ms", va="center", fontsize=8)
    steps = zip(itertools.pairwise(rows), itertools.pairwise(times), strict=True)
    for place, (((_, before), (key, row)), (was, now)) in enumerate(steps, start=1):
        changed = over(row, before, run.rows)
        sure = abs(math.log(changed.value)) > 2 * changed.error
        colour = BETTER if now <= was else WORSE
        axes.barh(key.path, now - was, left=was, color=colour, alpha=1.0 if sure else 0.35)
        axes.text(max(was, now), place, f" {now:,.0f} ms", va="center", fontsize=8)
    axes.barh("all levers", times[-1], color=OURS)
    axes.text(times[-1], len(rows), f" {times[0] / times[-1]:.2f}×", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(times))
    axes.set_xlabel("ms a step, cumulative")
    axes.set_title(_sizes(rows[0]) + f"; {run.machine}", fontsize=9)
    return picture


def _with_parts(run: SuiteRun) -> list[tuple[Key, Row]]:
    return [(key, row) for key, row in measured(run, LEVERS) if row.get("parts")]


def pie(run: SuiteRun) -> Any:
    """Shares of a step's time, of the first lever's row and of the last's."""
    rows = _with_parts(run)
    chosen = rows if len(rows) == 1 else [rows[0], rows[-1]]
    picture = figure(5 * len(chosen) + 1, 5)
    for place, (key, row) in enumerate(chosen, start=1):
        axes = picture.add_subplot(1, len(chosen), place)
        phases: dict[str, float] = {}
        slices: list[tuple[str, str, float]] = []
        for phase in dict.fromkeys(part["phase"] for part in row["parts"]):
            parts = [part for part in row["parts"] if part["phase"] == phase]
            large = [part for part in parts if part["share"] >= LEAST_SHARE]
            phases[phase] = sum(part["share"] for part in parts)
            slices += [(phase, part["part"], part["share"]) for part in large]
            rest = phases[phase] - sum(part["share"] for part in large)
            slices.append((phase, "rest", rest))
        colours = dict(zip(phases, COLOURS, strict=False))
        edge = {"edgecolor": "white", "linewidth": 1}
        axes.pie(
            list(phases.values()),
            radius=0.7,
            labels=[f"{name}\n{share:.0%}" for name, share in phases.items()],
            labeldistance=0.45,
            colors=list(colours.values()),
            textprops={"fontsize": 8, "ha": "center", "color": "white"},
            wedgeprops=edge,
        )
        axes.pie(
            [share for *_, share in slices],
            radius=1.0,
            labels=[f"{name} {s:.0%}" if s >= LEAST_SHARE else "" for _, name, s in slices],
            labeldistance=1.04,
            colors=[colours[phase] for phase, *_ in slices],
            textprops={"fontsize": 7},
            wedgeprops={**edge, "width": 0.3, "alpha": 0.6},
        )
        axes.set_title(key.path if key.path == "reference" else f"… up to {key.path}", fontsize=9)
    picture.suptitle(f"{_sizes(rows[0])}; {run.machine}", fontsize=9)
    return picture


def _rates(run: SuiteRun) -> list[tuple[Key, Row]]:
    """Of loader and step; empty unless both are there."""
    rows = [
        (key, row)
        for key, row in measured(run, "loader", "step")
        if row.get("images_per_s") and key.path != AGAIN
    ]
    return rows if {key.suite for key, _ in rows} == {"loader", "step"} else []


def loader_and_step(run: SuiteRun) -> Any:
    """Images a second that loaders deliver and that steps take."""
    rows = _rates(run)
    picture = figure(9, 0.25 * len(rows) + 1.5)
    axes = picture.add_subplot()
    labels = []
    for place, (key, row) in enumerate(rows):
        core = " a core" if row.get("clock") == "process_time" else ""
        labels.append(f"{key.suite}: {key.part}, {key.path}, {_sizes((key, row))}{core}")
        axes.barh(place, row["images_per_s"], color=OTHERS if key.suite == "loader" else OURS)
        axes.text(row["images_per_s"], place, f" {row['images_per_s']:,.4g}", va="center", size=7)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="images/s")
    axes.set_xlim(right=3 * max(row["images_per_s"] for _, row in rows))
    axes.set_title(run.machine, fontsize=9)
    return picture


def _over_batch(run: SuiteRun, field: str, label: str, factor: float) -> Any:
    picture = figure()
    axes = picture.add_subplot()
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for key, row in measured(run, "batch sizes"):
        if row.get(field) is not None:
            sizes = json.loads(key.sizes)
            line = lines.setdefault((sizes.get("model", key.part), key.path), [])
            line.append((sizes["batch"], factor * row[field]))
    for number, ((model, path), points) in enumerate(lines.items()):
        batches, values = zip(*sorted(points), strict=True)
        colour = {"reference": REFERENCE, FAST: OURS}.get(path, COLOURS[number % len(COLOURS)])
        axes.plot(batches, values, marker="o", color=colour, label=f"{model}, {path}")
    every = sorted({batch for points in lines.values() for batch, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [str(batch) for batch in every])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="images a step", ylabel=label)
    axes.legend(fontsize=8)
    axes.set_title(run.machine, fontsize=9)
    return picture


def throughput(run: SuiteRun) -> Any:
    return _over_batch(run, "images_per_s", "images/s", 1.0)


def memory(run: SuiteRun) -> Any:
    return _over_batch(run, "peak_bytes", "peak memory, MB", 1e-6)


def _batches(field: str) -> Callable[[SuiteRun], list[tuple[Key, Row]]]:
    return lambda run: [
        (key, row) for key, row in measured(run, "batch sizes") if row.get(field) is not None
    ]


def _sizes(pair: tuple[Key, Row]) -> str:
    return ", ".join(f"{name} {value}" for name, value in json.loads(pair[0].sizes).items())


PLOTS = (
    Plot(
        "roofline",
        "Roofline",
        "Counted FLOPs and least bytes of every suite that states them, below what this machine's "
        "own matrix product and copy reached in the same session. Filled: the fast path; rings: "
        "the reference; crosses: others. A point above a line: what it moves stays in the "
        "caches, or the machine was busy when its limit was measured.",
        _counted,
        roofline,
    ),
    Plot(
        "waterfall",
        "From the reference step to the fast step",
        "Levers are switched on one after another and stay on; each bar is what the step's time "
        "changed by, pale where that is within the noise. Those that can't be switched here are in "
        "the table of suite *levers*, with the reason.",
        _levers,
        waterfall,
    ),
    Plot(
        "step-time",
        "Where the step's time goes",
        "One step under PyTorch's profiler, by phase (inner ring) and kind of work (outer), as "
        "`python -m fastbeit.profile` divides it.",
        _with_parts,
        pie,
    ),
    Plot(
        "loader-and-step",
        "Loader and step",
        "Images a second that each loader delivers and each step takes, on a logarithmic scale: "
        "training runs at the smaller. *A core*: by the process's CPU time.",
        _rates,
        loader_and_step,
    ),
    Plot(
        "throughput",
        "Throughput over batch size",
        "Whole steps without a loader.",
        _batches("images_per_s"),
        throughput,
    ),
    Plot(
        "memory",
        "Memory over batch size",
        "On a GPU the most that torch's allocator held; on a CPU by how much the process grew "
        "above where it stood with model and inputs made.",
        _batches("peak_bytes"),
        memory,
    ),
)
