"""What ``fastbeit.data.tune`` found: as a record, as a table, and as a file of its own."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastbeit import hardware
from fastbeit.data.source import Source
from fastbeit.data.tune_search import Search, Setting

NEEDED = 1.3
"""Loader over step: below that a slow batch now and then makes the step wait."""
SIZED_IMAGES = 256
PACKAGES = ("torch", "pillow", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def machine(device: torch.device) -> dict[str, Any]:
    """Where the record comes from."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else hardware.cpu_name(),
        "device_type": device.type,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": _versions(),
    }


def mean_kb(source: Source) -> float:
    """Kilobytes of an encoded image, on average over some from all of the data."""
    step = max(1, len(source) // SIZED_IMAGES)
    sizes = [len(source.read(number)) for number in range(0, len(source), step)]
    return sum(sizes) / len(sizes) / 1000


def results(search: Search, best: Setting, step_rate: float | None) -> dict[str, Any]:
    """What was measured, and what follows."""
    rate = search.rate(best)
    return {
        "cut_short": search.cut_short,
        "settings": [
            {**asdict(setting), "images_per_s": search.rate(setting), "all": rates}
            for setting, rates in search.rates.items()
        ],
        "best": {**asdict(best), "images_per_s": rate, "flags": best.flags()},
        "step_images_per_s": step_rate,
        "loader_over_step": None if step_rate is None else rate / step_rate,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def report(record: dict[str, Any]) -> str:
    """The record as a table, the best flags, and the verdict."""
    lines = [
        f"{record['recipe']}: {record['micro_batch']} images of {record['image_kb']:.0f} KB at a "
        f"time on {record['device']}, {record['cores']} cores for this rank",
        "",
        f"{'loader':<10} {'workers':>7} {'prefetch':>8} {'hw load':>8} {'images/s':>10}   spread",
    ]
    for row in sorted(record["settings"], key=lambda row: -row["images_per_s"]):
        load = "-" if row["hw_decoder_load"] is None else f"{row['hw_decoder_load']:g}"
        spread = (max(row["all"]) - min(row["all"])) / row["images_per_s"]
        lines.append(
            f"{row['loader']:<10} {row['workers']:>7} {row['prefetch']:>8} {load:>8} "
            f"{row['images_per_s']:>10,.0f}   {spread:.0%}, {len(row['all'])} times"
        )
    if record["note"]:
        lines += ["", record["note"]]
    if record["cut_short"]:
        lines += ["", "The time was over before the search ended: --tune-seconds gives it more."]
    best = record["best"]
    lines += ["", f"best: {best['flags']}   {best['images_per_s']:,.0f} images/s", verdict(record)]
    return "\n".join(lines)


def verdict(record: dict[str, Any]) -> str:
    """Whether the loader outruns the step by :data:`NEEDED`."""
    ratio = record["loader_over_step"]
    if ratio is None:
        return "step: not known; give --step-images-per-s RATE or --tune-run RUN_DIR"
    told = f"{ratio:.2f} times the step's {record['step_images_per_s']:,.0f} images/s"
    if record["device_type"] == "cpu":
        return f"alone it makes {told}; while training both share the cores, so this is no verdict"
    if ratio >= NEEDED:
        return f"good: {told}, at least {NEEDED} is wanted"
    return f"too slow: {told}, {NEEDED} is wanted; more cores, smaller images, or less jitter"


def write_new(folder: Path, record: dict[str, Any], now: Callable[[], str] | None = None) -> Path:
    """Writes ``<date>-<device type>.json``, with -2, -3, ... where that is taken."""
    moment = now() if now else datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        suffix = f"-{number}" if number > 1 else ""
        path = folder / f"{moment}-{record['device_type']}{suffix}.json"
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(record, file, indent=1)
                file.write("\n")
            return path
        except FileExistsError:
            number += 1
