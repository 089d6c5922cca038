"""A folder of results: made once, never overwritten, complete up to the last line however it ended.

<date>T<time>Z-<cpu or gpu>-<source>/
    environment.json   CPU, GPU, driver, clocks, versions, source, command
    rows.jsonl         one JSON object a line, written and synced as soon as it is known
    summary.md         the same in tables
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]


ROOT = Path(__file__).resolve().parents[1]


def without_places(text: str) -> str:
    """Results are published: the checkout, Python's folder, the home folder and the one for
    temporary files of whoever ran them go unnamed."""
    text = text.replace(str(ROOT), ".")
    for prefix in {sys.prefix, sys.base_prefix}:
        if len(prefix) > len("/usr"):
            text = text.replace(prefix, "$PYTHON")
    home = os.path.expanduser("~")
    text = text.replace(home, "~") if len(home) > 1 else text
    return text.replace(tempfile.gettempdir(), "$TMPDIR")


def plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become null. Private folders are not named."""
    if isinstance(value, str):
        return without_places(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


class ResultFolder:
    """Where one run writes. ``create`` makes a new folder each time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = (path / "rows.jsonl").open("a", encoding="utf-8")

    @classmethod
    def create(cls, out: Path, label: str, now: datetime | None = None) -> ResultFolder:
        """``out/<date>-<label>``, or with -2, -3, ... behind it where that is taken."""
        moment = (now or datetime.now(UTC)).strftime("%Y-%m-%dT%H%M%SZ")
        label = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "run"
        out.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = out / (f"{moment}-{label}" + (f"-{number}" if number > 1 else ""))
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
                continue
            return cls(path)

    def add(self, row: Row) -> None:
        """Append a row and wait until it is on the disk."""
        self._rows.write(json.dumps(plain(row), allow_nan=False) + "\n")
        self._rows.flush()
        os.fsync(self._rows.fileno())

    def write(self, name: str, text: str) -> None:
        """Write a file of this run whole: a reader sees the old text or the new."""
        part = self.path / f".{name}.part"
        part.write_text(without_places(text), encoding="utf-8")
        part.replace(self.path / name)

    def write_environment(self, environment: Row) -> None:
        text = json.dumps(plain(environment), indent=2, sort_keys=True, allow_nan=False)
        self.write("environment.json", text + "\n")

    def close(self) -> None:
        """Also cleans what other processes logged into the folder."""
        self._rows.close()
        for name in (path.name for path in self.path.iterdir() if path.suffix in (".log", ".txt")):
            text = (self.path / name).read_text(encoding="utf-8", errors="replace")
            if text:
                self.write(name, text)
            else:
                (self.path / name).unlink()


def read_rows(folder: Path) -> list[Row]:
    """All whole lines; what a killed run left of its last line is dropped."""
    rows = []
    path = folder / "rows.jsonl"
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_environment(folder: Path) -> Row:
    path = folder / "environment.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def result_folders(results: Path) -> Iterator[Path]:
    """Folders of runs, the oldest first."""
    if results.is_dir():
        for path in sorted(results.iterdir()):
            if (path / "environment.json").is_file():
                yield path
