"""Bad samples: what was wrong with which, and when there are too many to go on.

A sample that can't be used is replaced by the next good one. Each is written once to
``bad_samples.jsonl``: ``{"path", "index", "reason", "substitute", "rank"}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_FIRST = 10


class BadRecord(NamedTuple):
    """One bad sample: number and path in the source, why, and which sample stands in for it."""

    index: int
    path: str
    reason: str
    substitute: int


class TooManyBadSamples(RuntimeError):
    """More bad samples than allowed; the message lists the first ten and the file with all."""


class BadSamples:
    """The bad samples of a run, each counted once, however often it is met.

    Ranks share one log: lines are appended with single writes, and before a rank adds a line it
    reads what others have added, so all count the same samples. (Two ranks that meet the same bad
    sample in the same instant may both write it; it is still counted once.) A resumed run goes on
    counting from the lines of the run before.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        log: Path | None = None,
        max_fraction: float = 0.01,
        rank: int = 0,
    ) -> None:
        """
        Args:
            num_samples: length of the source.
            log: file to append to; None keeps records in memory only.
            max_fraction: share of the source's samples that may be bad. At least one may be, unless
                the fraction is 0: then the first one stops the run.
            rank: written into each line.
        """
        if not 0.0 <= max_fraction <= 1.0:
            raise ValueError(f"max_bad_fraction must lie in [0, 1], got {max_fraction}")
        self.limit = max(1, int(max_fraction * num_samples)) if max_fraction > 0 else 0
        self._num_samples = num_samples
        self._max_fraction = max_fraction
        self._rank = rank
        self._log = log
        self._read_to = 0
        self._records: dict[int, BadRecord] = {}
        self._read_log()

    @property
    def count(self) -> int:
        """Distinct bad samples so far."""
        return len(self._records)

    @property
    def records(self) -> list[BadRecord]:
        """In the order in which they were found."""
        return list(self._records.values())

    def add(self, records: Iterable[BadRecord]) -> None:
        """Count and log what is new.

        Raises:
            TooManyBadSamples: the count is now above the limit.
        """
        new = [record for record in records if record.index not in self._records]
        if not new:
            return
        self._read_log()
        for record in new:
            if record.index not in self._records:
                self._records[record.index] = record
                self._write(record)
        if self.count > self.limit:
            raise TooManyBadSamples(self._message())

    def give_up(self) -> TooManyBadSamples:
        """The error for a source in which no good sample was found."""
        return TooManyBadSamples(f"no good sample is left. {self._message()}")

    def _message(self) -> str:
        first = "\n".join(f"  {record.path}: {record.reason}" for record in self.records[:_FIRST])
        more = f"\n  ... and {self.count - _FIRST} more" if self.count > _FIRST else ""
        where = f"\nAll are listed in {self._log}." if self._log else ""
        return (
            f"{self.count} of {self._num_samples} samples are bad, more than the {self.limit} "
            f"that max_bad_fraction={self._max_fraction:g} allows:\n{first}{more}{where}\n"
            "Repair or remove them, or raise max_bad_fraction."
        )

    def _write(self, record: BadRecord) -> None:
        if self._log is None:
            return
        line = json.dumps(
            {
                "path": record.path,
                "index": record.index,
                "reason": record.reason,
                "substitute": record.substitute,
                "rank": self._rank,
            },
            ensure_ascii=True,
        )
        self._log.parent.mkdir(parents=True, exist_ok=True)
        # One write with O_APPEND: lines of different ranks can't be mixed.
        file = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line.encode() + b"\n")
        finally:
            os.close(file)

    def _read_log(self) -> None:
        """Take over the lines that were added since the last look."""
        if self._log is None or not self._log.exists():
            return
        with self._log.open("rb") as file:
            file.seek(self._read_to)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                record = BadRecord(
                    int(entry["index"]),
                    str(entry["path"]),
                    str(entry["reason"]),
                    int(entry["substitute"]),
                )
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a crash names no sample; the sample is met again
            self._records.setdefault(record.index, record)
