"""One self-contained page about a run: ``report.html``.

    write_report(run_dir, model=model, tokenizer=tokenizer, batch=batch, config=config)
    python -m fastbeit.report RUN_DIR          # render it again from the files in the folder

Everything is inside the file: style, curves (SVG) and pictures; it opens without a network and can
be sent by mail. matplotlib is imported when a page is rendered, not before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastbeit import __version__
from fastbeit.batch import MimBatch
from fastbeit.report.comparison import evaluation
from fastbeit.report.gallery import gallery
from fastbeit.report.markup import Markup, join, tag
from fastbeit.report.record import RunRecord, read_run
from fastbeit.report.samples import SAMPLES_FILE, ReportSamples, collect_samples
from fastbeit.report.sections import (
    bad_samples,
    details,
    learning,
    throughput,
    tiles,
)
from fastbeit.report.style import STYLE

__all__ = [
    "ReportSamples",
    "RunRecord",
    "collect_samples",
    "read_run",
    "render_page",
    "render_report",
    "write_report",
]

REPORT_FILE = "report.html"


def write_report(
    run_dir: str | Path,
    *,
    model: Any,
    tokenizer: Any,
    batch: MimBatch,
    config: Any,
    summary: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
) -> Path:
    """Makes the sample pictures, saves them in the run folder, and writes ``report.html``.

    Args:
        run_dir: holds ``metrics.jsonl``; ``config.json``, ``summary.json`` and
            ``bad_samples.jsonl`` are used where they are.
        model: the trained model, whole on one device; ``model(images, positions) -> logits``.
        tokenizer: as :func:`fastbeit.tokenizer.load_tokenizer` gives it.
        batch: images for the picture grid, up to eight of them.
        config: a PretrainConfig, or its fields as nested mappings.
        summary: in place of ``summary.json``.
        names: of the samples in ``batch``.

    Returns:
        The path of the page.

    Raises:
        ValueError: no ``metrics.jsonl`` in ``run_dir``.
    """
    run_dir = Path(run_dir)
    data = config["data"] if isinstance(config, Mapping) else asdict(config.data)
    collect_samples(
        model,
        tokenizer,
        batch,
        mean=data["mean"],
        std=data["std"],
        grid=model.config.grid,
        names=names,
    ).save(run_dir / SAMPLES_FILE)
    return render_report(run_dir, summary=summary)


def render_report(run_dir: str | Path, *, summary: Mapping[str, Any] | None = None) -> Path:
    """Writes ``report.html`` from the files of a run folder; needs neither model nor data.

    Raises:
        ValueError: no ``metrics.jsonl`` in ``run_dir``.
    """
    run = read_run(run_dir)
    if summary is not None:
        run = replace(run, summary=dict(summary))
    path = Path(run_dir) / REPORT_FILE
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render_page(run), encoding="utf-8")
    partial.replace(path)
    return path


def render_page(run: RunRecord) -> str:
    """The whole page as text."""
    recipe = str(run.config.get("recipe") or run.summary.get("recipe") or run.name)
    steps = run.metrics[-1]["step"] if run.metrics else 0
    state = f"{steps:,} steps" if run.summary else f"{steps:,} steps so far"
    model = run.config.get("model", {})
    shape = ""
    if "width" in model and "depth" in model:
        shape = f"; {model['depth']} blocks of width {model['width']}"
    body = join(
        tag(
            "header",
            tag("h1", f"BEiT pre-training: {recipe}"),
            tag("p", f"Run folder {run.name}: {state}{shape}.", class_="lead"),
            tiles(run),
            class_="top",
        ),
        tag(
            "main",
            learning(run),
            gallery(run.samples),
            evaluation(run),
            throughput(run),
            bad_samples(run),
            details(run),
        ),
        tag("footer", tag("p", f"Made by fastbeit {__version__}. Metrics: metrics.jsonl.")),
    )
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{recipe}: fastbeit report"),
        tag("style", Markup(STYLE)),
    )
    return "<!doctype html>\n" + tag("html", tag("head", head), tag("body", body), lang="en")
