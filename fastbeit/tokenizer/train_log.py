"""What is seen of tokenizer training: a live line on a terminal, plain lines elsewhere, JSONL."""

from __future__ import annotations

import json
import math
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastbeit.tokenizer.train_config import TrainConfig

_FORMATS = {
    "images_per_s": ".1f",
    "codebook_used": "d",
    "codebook_perplexity": ".1f",
    "codes_revived": "d",
    "lr": ".2e",
    "validation_codes_used": "d",
    "validation_perplexity": ".1f",
    "validation_psnr_db": ".2f",
    "validation_mse": ".5f",
}


class MetricLog:
    """Writes ``OUT.jsonl`` afresh, and shows each line on the screen."""

    def __init__(self, config: TrainConfig) -> None:
        path = config.out.with_suffix(".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._start = time.monotonic()
        self._progress: Progress | None = None
        if sys.stdout.isatty():
            self._progress = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(),
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=config.steps)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """One line for the reader."""
        if self._progress is None:
            print(text, flush=True)
        else:
            self._progress.console.print(text, markup=False, highlight=False)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics; a value that is not finite becomes null in the file."""
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        line = {"step": step, **values, "time_s": round(time.monotonic() - self._start, 3)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        text = " ".join(f"{k}={v:{_FORMATS.get(k, '.4f')}}" for k, v in metrics.items())
        if self._progress is None or step == 0 or "loss_nats" not in metrics:
            self.say(f"step={step} {text}")
        if self._progress is not None and "loss_nats" in metrics:
            shown = ("reconstruction_nats", "codebook_used", "codebook_perplexity", "images_per_s")
            words = [f"{k}={metrics[k]:{_FORMATS.get(k, '.4f')}}" for k in shown]
            self._progress.update(self._task, completed=step, description=" ".join(words))

    def close(self) -> None:
        """Ends the live line and the file."""
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
