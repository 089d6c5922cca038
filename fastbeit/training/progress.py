"""What a person sees while a run trains, and the one object that the training loop logs to.

On a terminal: a live panel (rich). Elsewhere, a log file or a CI page: one plain ``key=value``
line a log interval, keys in a fixed order. Rank 0 only; on other ranks every method does nothing.

    log = RunLog(run_dir, total_steps=500_000, start_step=resumed, rank=rank)
    log.tick(step)                                  # every step: cheap, touches no device
    log.log(step, loss_nats=3.1, accuracy=0.4, ...)   # every log interval
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastbeit.training.metrics import (
    METRICS_FILE,
    JsonlSink,
    MetricSink,
    Scalar,
    make_sink,
    to_scalar,
)

# name -> format; the order of the plain line. Keys not listed follow, sorted.
PLAIN_FORMATS = {
    "epoch": ".2f",
    "loss_nats": ".4f",
    "chance_loss_nats": ".4f",
    "accuracy": ".4f",
    "chance_accuracy": ".4f",
    "lr": ".3e",
    "grad_norm": ".3f",
    "images_per_s": ".1f",
    "step_ms": ".1f",
    "data_wait_share": ".3f",
    "mfu": ".4f",
    "codebook_used": "d",
    "codebook_perplexity": ".1f",
    "skipped_steps": "d",
    "bad_samples": "d",
    "images_seen": "d",
    "time_s": ".1f",
}
# The share of a step spent waiting for data above which the loader is named as the bottleneck.
WAIT_WARNING_SHARE = 0.2
_TICK_INTERVAL_S = 0.25


class RunLog:
    """Metrics to files and to the screen.

    Args:
        run_dir: the run folder; ``metrics.jsonl`` is appended to, after dropping its lines beyond
            ``start_step``.
        total_steps: steps of the whole run.
        start_step: steps finished before this process: 0, or the resumed checkpoint's step.
        sinks: further sinks beside metrics.jsonl: "tensorboard", "wandb", or objects with
            ``log(step, metrics)`` and ``close()``.
        terminal: True for the live panel, False for plain lines, None: by whether standard output
            is a terminal.
        config: the resolved configuration, for sinks that store it.
        mfu_peak: what ``mfu`` is a share of, shown beside it: "989 TFLOP/s, H200 bf16 dense".
        title: heading of the panel.
        rank: only rank 0 writes and shows.
        console: where to show; default standard output.

    Raises:
        ValueError: a sink that is unknown or not installed; a metrics.jsonl that isn't one.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        start_step: int = 0,
        sinks: Sequence[str | MetricSink] = (),
        terminal: bool | None = None,
        config: Mapping[str, Any] | None = None,
        mfu_peak: str | None = None,
        title: str = "fastbeit",
        rank: int = 0,
        console: Console | None = None,
    ) -> None:
        self.total_steps = total_steps
        self._last_step = start_step
        self._active = rank == 0
        self._live: Live | None = None
        self._sinks: list[MetricSink] = []
        self._metrics: dict[str, Scalar] = {}
        self._tick_step, self._ticked_at = start_step, 0.0
        self.mfu_peak, self._title = mfu_peak, title
        if not self._active:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        # The optional sinks first: one that can't be opened must not truncate metrics.jsonl.
        extra = [
            make_sink(sink, run_dir, config=config, start_step=start_step)
            if isinstance(sink, str)
            else sink
            for sink in sinks
        ]
        self._sinks = [JsonlSink(run_dir / METRICS_FILE, start_step=start_step), *extra]
        live = sys.stdout.isatty() if terminal is None else terminal
        if console is None:
            console = Console(force_terminal=True if live else None, file=sys.stdout)
        self._console = console
        if live:
            # No refresh thread: loaders fork, and a thread that holds the output lock then would
            # leave a child hanging. tick() and log() redraw.
            self._live = Live(self._render(), console=console, auto_refresh=False)
            self._live.start()

    def log(self, step: int, **metrics: Any) -> None:
        """Writes the numbers of ``step`` (finished steps, counted from 1) everywhere.

        Args:
            step: greater than every step logged before.
            metrics: numbers (0-d tensors are read back: a host sync), strings or None.

        Raises:
            ValueError: a step that was logged before, or a metric that is not a scalar.
        """
        if not self._active:
            return
        if step <= self._last_step:
            raise ValueError(
                f"steps are logged once, in ascending order: got {step} after {self._last_step}"
            )
        clean = {name: to_scalar(value) for name, value in metrics.items()}
        for sink in self._sinks:
            sink.log(step, clean)
        self._last_step = self._tick_step = step
        self._metrics.update(clean)
        if self._live:
            self._live.update(self._render(), refresh=True)
        else:
            self._print(plain_line(step, self.total_steps, clean, eta_s=self.eta_s))

    def tick(self, step: int) -> None:
        """Moves the bar of the live panel, at most four times a second; touches no device."""
        if not self._live:
            return
        now = time.monotonic()
        if now - self._ticked_at >= _TICK_INTERVAL_S:
            self._tick_step, self._ticked_at = step, now
            self._live.update(self._render(), refresh=True)

    def note(self, text: str) -> None:
        """Prints one message: above the panel, or as a line of its own."""
        if not self._active:
            return
        if self._live:
            self._live.console.print(Text(text))
        else:
            self._print(text)

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the last logged step time; None before the first."""
        step_ms = self._metrics.get("step_ms")
        if not isinstance(step_ms, (int, float)):
            return None
        return max(self.total_steps - self._tick_step, 0) * step_ms / 1000

    def close(self) -> None:
        """Leaves the panel on the screen and closes the files; harmless when called again."""
        if self._live:
            self._live.stop()
            self._live = None
        for sink in self._sinks:
            sink.close()
        self._sinks = []
        self._active = False

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _print(self, text: str) -> None:
        # Not Console.print: it wraps at 80 columns where there is no terminal.
        print(text, file=self._console.file, flush=True)

    def _render(self) -> Panel:
        step = max(self._tick_step, self._last_step)
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        share = step / max(self.total_steps, 1)
        eta = f"ETA {format_duration(self.eta_s)}" if self.eta_s is not None else "ETA -"
        bar.add_row(
            ProgressBar(total=max(self.total_steps, 1), completed=step),
            f"{step:,} / {self.total_steps:,}  {share:.1%}  {eta}",
        )
        return Panel(
            Group(bar, metrics_table(self._metrics, mfu_peak=self.mfu_peak)),
            title=escape(self._title),
            title_align="left",
            border_style="cyan",
        )


def plain_line(
    step: int, total_steps: int, metrics: Mapping[str, Scalar], *, eta_s: float | None = None
) -> str:
    """One ``key=value`` line: step, the known keys in their order, other keys sorted, eta_s.

    A number that is None (not finite, or not known) shows as ``nan``.
    """
    unknown_mfu = {"mfu"} if metrics.get("mfu") is None else set()  # no peak is stated for CPUs
    known = [name for name in PLAIN_FORMATS if name in metrics and name not in unknown_mfu]
    other = sorted(set(metrics) - set(known) - unknown_mfu - {"step"})
    parts = [f"step={step}/{total_steps}"]
    for name in [*known, *other]:
        parts.append(f"{name}={_format(metrics[name], PLAIN_FORMATS.get(name, '.6g'))}")
    if eta_s is not None:
        parts.append(f"eta_s={eta_s:.0f}")
    return " ".join(parts)


def metrics_table(metrics: Mapping[str, Scalar], *, mfu_peak: str | None = None) -> Table:
    """The rows of the live panel."""

    def number(name: str, format_spec: str, scale: float = 1.0) -> str:
        value = metrics.get(name)
        if not isinstance(value, (int, float)):
            return "-"
        return format(value * scale, format_spec)

    wait = metrics.get("data_wait_share")
    waiting = isinstance(wait, (int, float)) and wait > WAIT_WARNING_SHARE
    skipped, bad = metrics.get("skipped_steps") or 0, metrics.get("bad_samples") or 0
    peak = f" of {escape(mfu_peak)}" if mfu_peak and metrics.get("mfu") is not None else ""
    table = Table.grid(padding=(0, 3))
    table.add_column()
    table.add_column()
    table.add_row(
        f"[bold]loss[/] {number('loss_nats', '.4f')} nats  "
        f"[dim]chance {number('chance_loss_nats', '.4f')}[/]",
        f"[bold]accuracy[/] {number('accuracy', '.1f', 100)} %  "
        f"[dim]chance {number('chance_accuracy', '.1f', 100)} %[/]",
    )
    table.add_row(
        f"[bold]{number('images_per_s', ',.0f')}[/] images/s  {number('step_ms', ',.1f')} ms/step",
        f"lr {number('lr', '.2e')}  grad norm {number('grad_norm', '.2f')}",
    )
    table.add_row(
        f"{'[yellow]' if waiting else ''}waiting for data {number('data_wait_share', '.1f', 100)} %"
        f"{' (bottleneck)[/]' if waiting else ''}",
        f"MFU {number('mfu', '.1f', 100)} %{peak}" if metrics.get("mfu") is not None else "MFU -",
    )
    table.add_row(
        f"codes {number('codebook_used', ',.0f')}  "
        f"perplexity {number('codebook_perplexity', ',.1f')}",
        f"{'[yellow]' if bad else ''}bad samples {bad}{'[/]' if bad else ''}  "
        f"{'[red]' if skipped else ''}skipped steps {skipped}{'[/]' if skipped else ''}",
    )
    return table


def format_duration(seconds: float) -> str:
    """``45s``, ``12m 05s``, ``3h 07m``, ``4d 02h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def _format(value: Scalar, format_spec: str) -> str:
    if value is None:
        return "nan"
    if isinstance(value, bool | str):
        return str(value).replace(" ", "_")
    if format_spec == "d":
        return str(int(value))
    return format(value, format_spec)
