"""The list of bad samples: counted once, written whole, capped."""

from __future__ import annotations

import json
import threading

import pytest

from fastbeit.data.bad import BadRecord, BadSamples, TooManyBadSamples


def record(index: int, reason: str = "empty file (0 bytes)") -> BadRecord:
    return BadRecord(index, f"folder/{index}.jpg", reason, index + 1)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_sample_is_counted_and_written_once(tmp_path):
    log = tmp_path / "run" / "bad_samples.jsonl"
    bad = BadSamples(1000, log=log, rank=3)
    for _ in range(4):
        bad.add([record(5), record(7, 'odd "reason"\nwith é')])
    assert bad.count == 2 and [r.index for r in bad.records] == [5, 7]
    assert lines(log) == [
        {
            "path": f"folder/{index}.jpg",
            "index": index,
            "reason": reason,
            "substitute": index + 1,
            "rank": 3,
        }
        for index, reason in ((5, "empty file (0 bytes)"), (7, 'odd "reason"\nwith é'))
    ]


def test_memory_only_without_a_log():
    bad = BadSamples(1000)
    bad.add([record(1)])
    assert bad.count == 1


@pytest.mark.parametrize(
    ("samples", "fraction", "limit"), [(1000, 0.01, 10), (50, 0.01, 1), (1000, 0.0, 0), (3, 1.0, 3)]
)
def test_limit_is_a_share_of_the_source_and_at_least_one(samples, fraction, limit):
    bad = BadSamples(samples, max_fraction=fraction)
    assert bad.limit == limit
    bad.add(record(index) for index in range(limit))
    with pytest.raises(TooManyBadSamples, match=f"{limit + 1} of {samples} samples are bad"):
        bad.add([record(limit)])


def test_the_error_lists_the_first_ten_and_the_file(tmp_path):
    log = tmp_path / "bad_samples.jsonl"
    bad = BadSamples(1200, log=log, max_fraction=0.01)
    with pytest.raises(TooManyBadSamples) as caught:
        bad.add(record(index) for index in range(13))
    message = str(caught.value)
    assert message.count("empty file") == 10 and "folder/9.jpg" in message
    assert "and 3 more" in message and str(log) in message and "max_bad_fraction=0.01" in message
    assert len(lines(log)) == 13


def test_fraction_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"max_bad_fraction must lie in \[0, 1\], got 1.5"):
        BadSamples(10, max_fraction=1.5)


def test_a_resumed_run_goes_on_counting_and_skips_a_torn_line(tmp_path):
    log = tmp_path / "bad_samples.jsonl"
    BadSamples(100, log=log, max_fraction=0.05).add([record(1), record(2)])
    with log.open("a") as file:
        file.write('{"path": "folder/3.jpg", "ind\n')
    bad = BadSamples(100, log=log, max_fraction=0.05)
    assert bad.count == 2
    bad.add([record(2), record(3)])
    assert bad.count == 3
    assert sum('"index": 2,' in line for line in log.read_text().splitlines()) == 1


def test_ranks_share_the_count(tmp_path):
    log = tmp_path / "bad_samples.jsonl"
    first, second = (BadSamples(100, log=log, max_fraction=0.02, rank=rank) for rank in (0, 1))
    first.add([record(1)])
    second.add([record(1), record(2)])
    assert [(line["index"], line["rank"]) for line in lines(log)] == [(1, 0), (2, 1)]
    with pytest.raises(TooManyBadSamples, match="3 of 100"):
        first.add([record(3)])


def test_writers_at_the_same_time_keep_lines_whole(tmp_path):
    log = tmp_path / "bad_samples.jsonl"
    ranks = [BadSamples(10_000, log=log, max_fraction=1.0, rank=rank) for rank in range(4)]

    def write(rank: int) -> None:
        for number in range(100):
            ranks[rank].add([record(rank * 1000 + number, "x" * 500)])

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line["index"] for line in lines(log)) == sorted(
        rank * 1000 + number for rank in range(4) for number in range(100)
    )
