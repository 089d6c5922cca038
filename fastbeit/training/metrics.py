"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if asked.

``metrics.jsonl`` holds one JSON object a line, one line a logged step, steps strictly ascending.
A line is flushed as it is written. A resumed run first drops what an earlier, killed process wrote
after the checkpoint that is resumed from, so a step is never there twice. NaN and infinity become
null: strict JSON parsers read every line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

METRICS_FILE = "metrics.jsonl"

Scalar = float | int | str | bool | None


class MetricSink(Protocol):
    """Takes the numbers of a step; ``None`` stands for a number that is not finite or not known."""

    def log(self, step: int, metrics: Mapping[str, Scalar]) -> None: ...

    def close(self) -> None: ...


def to_scalar(value: Any) -> Scalar:
    """A plain JSON scalar; tensors are read back (host sync), NaN and infinity become None."""
    if isinstance(value, torch.Tensor) or hasattr(value, "dtype"):
        if value.ndim and value.shape != (1,):
            raise ValueError(f"metrics are single numbers, got shape {list(value.shape)}")
        value = value.item()  # host sync for a device tensor: only where the loop logs
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(f"metrics are numbers or strings, got {type(value).__name__}: {value!r}")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, oldest first; a torn last line (a killed run's) is left out.

    Raises:
        ValueError: a line before the last is not a JSON object with an integer "step".
    """
    records = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            valid = isinstance(record, dict) and isinstance(record.get("step"), int)
        except ValueError:
            record, valid = None, False
        if valid:
            records.append(record)
        elif number != last:
            raise ValueError(
                f'{path}, line {number + 1}: expected a JSON object with an integer "step", got '
                f"{line[:80]!r}; delete that line to go on"
            )
    return records


class JsonlSink:
    """Appends to ``metrics.jsonl``, first dropping lines after ``start_step``."""

    def __init__(self, path: str | Path, *, start_step: int = 0) -> None:
        self.path = Path(path)
        if self.path.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= start_step]
            _replace_text(self.path, "".join(_line(record) for record in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, Scalar]) -> None:
        self._file.write(_line({"step": step, **metrics}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Event files under ``run_dir/tensorboard``; events after ``start_step`` are purged."""

    def __init__(self, run_dir: str | Path, *, start_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(_missing("--tensorboard", "tensorboard", error)) from error
        self._writer = SummaryWriter(
            str(Path(run_dir) / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def log(self, step: int, metrics: Mapping[str, Scalar]) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run, resumed under the same id that ``run_dir/wandb_id`` holds."""

    def __init__(
        self, run_dir: str | Path, *, config: Mapping[str, Any] | None = None, start_step: int = 0
    ) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(_missing("--wandb", "wandb", error)) from error
        id_file = Path(run_dir) / "wandb_id"
        previous = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        self._run = wandb.init(
            project="fastbeit",
            name=Path(run_dir).name,
            dir=str(run_dir),
            config=dict(config or {}),
            id=previous if start_step else None,
            resume="allow",
        )
        _replace_text(id_file, self._run.id + "\n")

    def log(self, step: int, metrics: Mapping[str, Scalar]) -> None:
        self._run.log({k: v for k, v in metrics.items() if v is not None}, step=step)

    def close(self) -> None:
        self._run.finish()


def make_sink(
    name: str,
    run_dir: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    start_step: int = 0,
) -> MetricSink:
    """The sink called ``name``: "tensorboard" or "wandb".

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    match name:
        case "tensorboard":
            return TensorBoardSink(run_dir, start_step=start_step)
        case "wandb":
            return WandbSink(run_dir, config=config, start_step=start_step)
    raise ValueError(f'sinks are "tensorboard" and "wandb", got {name!r}')


def _missing(flag: str, package: str, error: ImportError) -> str:
    return (
        f"{flag} needs the package {package}, which can't be imported here ({error}): "
        'pip install "fastbeit[tracking]", or leave the flag out (metrics.jsonl is always written)'
    )


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


def _replace_text(path: Path, text: str) -> None:
    """Atomic: a kill leaves the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
