"""The model of many GPUs: by hand, by conservation, and against a simulation of FSDP2's streams."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastbeit.model import BeitConfig
from fastbeit.recipes import load_recipe
from fastbeit.training.scale import MODES, Collective, Group, Mode, Traffic, model_units, traffic
from fastbeit.training.scale_assumptions import Assumptions
from fastbeit.training.scale_time import Compute, gpu_time, nccl_seconds

NODE, TWO_NODES, CLUSTER = Group(8, 1), Group(16, 2), Group(512, 64)
SMALL = BeitConfig(image_size=32, patch_size=8, width=64, depth=8, heads=2, vocab_size=64)
UNITS = model_units(SMALL, "bf16")


# ---------------------------------------------------------------- bytes


def test_bytes_that_a_rank_sends_by_hand() -> None:
    assert Collective("all_gather", 800, NODE).sent == 700  # seven parts of 100 pass through
    assert Collective("reduce_scatter", 800, NODE).sent == 700
    assert Collective("all_reduce", 800, NODE).sent == 1400
    assert Collective("all_reduce", 32, Group(2, 1)).sent == 32
    assert Collective("all_reduce", 32, Group(1, 1)).sent == 0


def test_the_units_hold_every_parameter_once() -> None:
    model = load_recipe("beit-base-in1k").model
    units = model_units(model, "bf16")
    assert [unit.name for unit in units][:3] == ["root", "table", "blocks 0 to 2"]
    assert sum(unit.numbers(1) for unit in units) == 91_965_776 + 12 * 768  # and the key biases
    assert [unit.item_bytes for unit in units] == [2, 4, 2, 2, 2, 2]
    # 768 rows in 512 parts are padded to 1,024: a projection sends a third more than it holds.
    projection = units[2]._replace(shapes=((768, 768),))
    assert projection.numbers(512) == 1024 * 768


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_what_is_sent_is_conserved(ranks: int) -> None:
    """In fp32 and without padding: a reduce for all is a scatter and a gather; zero3 gathers every
    unit but the root once more; inside a node hybrid is zero3."""
    units = model_units(SMALL, "fp32")
    units = [unit._replace(shapes=((64 * unit.numbers(1),),)) for unit in units]
    sent = {mode: traffic(units, mode, ranks, 8).sent() for mode in MODES}
    totals = traffic(units, "none", ranks, 8).totals[0].sent
    assert sent["zero2"] == sent["none"]
    gathers = (sent["none"] - totals) / 2
    root = units[0].numbers(1) / sum(unit.numbers(1) for unit in units)
    assert sent["zero3"] - sent["zero2"] == pytest.approx((1 - root) * gathers)
    if ranks <= 8:
        assert sent["hybrid"] == sent["zero3"]


def test_hybrid_sends_shards_across_nodes_and_the_rest_inside() -> None:
    sends = traffic(UNITS, "hybrid", 64, 8)
    for unit in sends.units:
        numbers = unit.unit.numbers(8)
        scatter, copy = unit.reduce
        assert scatter == Collective("reduce_scatter", 4 * numbers, Group(8, 1))
        assert copy == Collective("all_reduce", 4 * numbers // 8, Group(8, 8))
    with pytest.raises(ValueError, match="full nodes of 8, got 12"):
        traffic(UNITS, "hybrid", 12, 8)


def test_accumulation_gathers_again_and_reduces_once() -> None:
    for mode in MODES:
        sends = traffic(UNITS, mode, 64, 8)
        once, twice = sends.sent(1), sends.sent(2)
        gathers = sum(c.sent for unit in sends.units for c in unit.forward + unit.backward)
        assert twice - once == pytest.approx(gathers)
        assert (gathers == 0) == (mode == "none")


# ---------------------------------------------------------------- seconds of one collective


@pytest.mark.parametrize(
    ("call", "microseconds"),
    [
        # Ring, Simple: base 8.4, seven hops of 3.4, 700 MB at 370 GB/s.
        (Collective("all_gather", 800_000_000, NODE), 8.4 + 7 * 3.4 + 700e6 / 370e3),
        # Ring, LL: fourteen hops of 0.6.
        (Collective("all_reduce", 32, NODE), 6.6 + 14 * 0.6 + 56 / (370e3 / 4)),
        # Tree, LL: up and down six levels of nodes (5.0 each) and seven neighbours in one (0.6).
        (Collective("all_reduce", 32, CLUSTER), 6.8 + 2 * (7 * 0.6 + 6 * 5.0)),
        # One rank a node, 47 GB/s each: 2 x 7/8 of 80 MB; Simple's fourteen hops of 14 beat LL128.
        (Collective("all_reduce", 80_000_000, Group(8, 8)), 8.4 + 14 * 14 + 140e6 / 47e3),
    ],
)
def test_seconds_by_hand(call: Collective, microseconds: float) -> None:
    assert nccl_seconds(call, Assumptions()) == pytest.approx(microseconds * 1e-6, rel=1e-3)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
@pytest.mark.parametrize("group", [NODE, TWO_NODES, CLUSTER, Group(64, 64)])
def test_seconds_grow_with_bytes_and_fall_with_bandwidth(kind, group: Group) -> None:
    sizes = [2**power for power in range(4, 31)]
    times = [nccl_seconds(Collective(kind, size, group), Assumptions()) for size in sizes]
    assert all(low < high for low, high in pairwise(times))
    call = Collective(kind, 10**9, group)
    faster = Assumptions(nvlink_gb_s=3700, nic_gb_s=470)
    assert nccl_seconds(call, faster) < nccl_seconds(call, Assumptions())
    slowest_link = min(370, 376 if group != Group(64, 64) else 47) * 1e9
    floor = call.sent / slowest_link
    assert floor < nccl_seconds(call, Assumptions()) < 1.6 * floor


# ---------------------------------------------------------------- a simulation of the streams


class Task(NamedTuple):
    """Something that a stream does, once all of ``after`` is done."""

    stream: str
    name: str
    seconds: float
    after: tuple[str, ...] = ()


def tasks(compute: Compute, sends: Traffic, cost, accumulation: int) -> Iterator[Task]:
    """FSDP2's step as its streams see it; ``begin`` marks when a computation has what it needs."""
    count = len(sends.units)

    def gather(name: str, calls, after: str) -> Iterator[Task]:
        yield Task("links", name, sum(map(cost, calls)), (after,))

    def seconds(number: int) -> float:
        blocks = sends.units[number].unit.blocks
        return sum(compute.blocks[b] for b in blocks) if number else compute.embedding

    for m in range(accumulation):
        yield Task("compute", f"tokens {m}", compute.tokenizer)
        for k, unit in enumerate(sends.units):
            after = f"begin forward {m} {k - 2}" if k >= 2 else f"tokens {m}"
            yield from gather(f"gather {m} {k}", unit.forward, after)
            yield Task("compute", f"begin forward {m} {k}", 0.0, (f"gather {m} {k}",))
            yield Task("compute", f"forward {m} {k}", seconds(k))
        yield Task("compute", f"head {m}", compute.head)
        yield Task("compute", f"head back {m}", compute.backward * compute.head)
        yield from gather(f"again {m} {count - 1}", sends.units[-1].backward, f"head {m}")
        for k in reversed(range(count)):
            waits = [f"again {m} {k}"]
            if m == accumulation - 1 and k + 2 < count:
                waits.append(f"scatter {k + 2}")
            yield Task("compute", f"begin back {m} {k}", 0.0, tuple(waits))
            if k:
                calls = sends.units[k - 1].backward
                yield from gather(f"again {m} {k - 1}", calls, f"begin back {m} {k}")
            yield Task("compute", f"back {m} {k}", compute.backward * seconds(k))
            if m == accumulation - 1:
                scatter = [c for c in sends.units[k].reduce if c.kind == "reduce_scatter"]
                copies = [c for c in sends.units[k].reduce if c.kind == "all_reduce"]
                back = f"back {m} {k}"
                if scatter:
                    yield from gather(f"scatter {k}", scatter, back)
                else:
                    yield Task("idle", f"scatter {k}", 0.0)
                after = (f"scatter {k}", back)
                yield Task("copies", f"copy {k}", sum(map(cost, copies)), after)
    everything = tuple(f"{name} {k}" for k in range(count) for name in ("scatter", "copy"))
    yield Task("copies", "totals", sum(map(cost, sends.totals)), (*everything, f"back {m} 0"))
    yield Task("compute", "update", compute.update, ("totals",))


def simulated(work: list[Task]) -> float:
    """Run each stream's tasks in order, whenever the first of one can start; the last's end."""
    queues: dict[str, list[Task]] = {}
    for task in work:
        queues.setdefault(task.stream, []).append(task)
    free, done = dict.fromkeys(queues, 0.0), {}
    while any(queues.values()):
        stream = next(
            s for s, queue in queues.items() if queue and all(a in done for a in queue[0].after)
        )
        task = queues[stream].pop(0)
        free[stream] = max([free[stream], *(done[a] for a in task.after)]) + task.seconds
        done[task.name] = free[stream]
    return max(done.values())


parts = st.floats(0.0, 10.0)


# A gather that waits for the computation two units before its own, and holds up its own.
@example("zero2", 8, 1, (0.0, 10.0, 0.0, 0.0), [0.1] * 8, 2.0, 1e7)
@settings(max_examples=300)
@given(
    mode=st.sampled_from(MODES),
    ranks=st.sampled_from([1, 2, 8, 64]),
    accumulation=st.integers(1, 3),
    fixed=st.tuples(parts, parts, parts, parts),
    blocks=st.lists(parts, min_size=8, max_size=8),
    latency=st.floats(0.0, 60.0),  # now a unit's arithmetic is longer, now its collectives
    bytes_per_s=st.floats(1e2, 1e7),
)
def test_the_clock_agrees_with_a_simulation_of_the_streams(
    mode: Mode, ranks: int, accumulation: int, fixed, blocks, latency: float, bytes_per_s: float
) -> None:
    """To rounding, whatever the speeds; and both lie between full overlap and none."""
    compute = Compute(fixed[0], fixed[1], tuple(blocks), fixed[2], fixed[3])
    sends = traffic(UNITS, mode, ranks, 8)

    def cost(call: Collective) -> float:
        return latency + call.sent / bytes_per_s

    found = gpu_time(compute, sends, cost, accumulation=accumulation)
    expected = simulated(list(tasks(compute, sends, cost, accumulation)))
    assert found.seconds == pytest.approx(expected, rel=1e-9, abs=1e-9)

    one_after_the_other = gpu_time(compute, sends, cost, accumulation=accumulation, overlap=False)
    everything = found.compute + sum(map(cost, sends.collectives(accumulation)))
    assert one_after_the_other.seconds == pytest.approx(everything)
    busiest = max(found.compute, found.intra, found.network)
    assert busiest * (1 - 1e-9) <= found.seconds <= everything * (1 + 1e-9)
    assert found.intra + found.network == pytest.approx(everything - found.compute, abs=1e-6)


def test_one_gpu_communicates_nothing() -> None:
    compute = Compute(1.0, 0.25, (0.5,) * 8, 0.25, 0.125)
    for mode in MODES:
        sends = traffic(UNITS, mode, 1, 8)
        assert sends.sent(4) == 0 and not list(sends.collectives(4))
        found = gpu_time(compute, sends, lambda call: 1e9, accumulation=4)
        assert found.seconds == found.compute == 4 * (1 + 3 * 4.5) + 0.125


def test_a_step_by_hand() -> None:
    """Copies alone (none), each 1 s, compute 1 s a unit: the last two and the totals are left."""
    assert [len(unit.blocks) for unit in UNITS] == [0, 0, 3, 3, 2]
    # Forward 8 blocks of 1 s; backward 1 s each: units of 2, 3, 3, then the table, the root.
    compute = Compute(0.0, 0.0, (1.0,) * 8, 0.0, 0.0, backward=1.0)
    sends = traffic(UNITS, "none", 8, 8)
    found = gpu_time(compute, sends, lambda call: 1.0)
    # Copies start at 10, 13, 16 (its unit ends with the backward pass), 17 and 18; totals at 19.
    assert found.seconds == 20.0
    assert (found.compute, found.exposed, found.intra) == (16.0, 4.0, 6.0)
    # Compute beside a copy is a tenth slower: one second of each of the two later units.
    slower = gpu_time(compute, sends, lambda call: 1.0, slowdown=0.1)
    assert slower.seconds == pytest.approx(20.2)
    # Copies of 100 s: the first slows all 3 s of the next unit (907 to 910.3), the first and the
    # second 196.7 s of the 900 that follow; the last three and the totals are left at 1829.97.
    uneven = compute._replace(blocks=(300.0,) * 3 + (1.0,) * 5)
    slower = gpu_time(uneven, sends, lambda call: 100.0, slowdown=0.1)
    assert slower.seconds == pytest.approx(1829.97 + 4 * 100)
    # AdamW's work is split over the shards.
    updating = compute._replace(update=8.0)
    assert gpu_time(updating, sends, lambda call: 1.0, shards=1).seconds == 28.0
    assert gpu_time(updating, sends, lambda call: 1.0, shards=8).seconds == 21.0
