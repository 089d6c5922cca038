"""The section on probe and kNN: trained encoder, random encoder, raw pixels."""

from __future__ import annotations

from math import sqrt
from typing import Any

from fastbeit.report.figures import Curve, chart
from fastbeit.report.markup import Markup, tag
from fastbeit.report.record import RunRecord


def evaluation(run: RunRecord) -> Markup:
    """Probe and kNN, beside the random encoder and raw pixels, and the choice of the block."""
    found = run.summary.get("evaluation")
    title = tag("h2", "What the features are worth")
    if not found:
        text = (
            "Not evaluated: a probe needs labelled train, validation and test splits, and "
            "evaluation that is not switched off."
        )
        return tag("section", title, tag("p", text, class_="note"))
    rows = [found["random"], found["trained"], found["pixels"]]
    best = {k: max(row[f"{k}_accuracy"] for row in rows) for k in ("probe", "knn")}
    body = []
    for row, colour in zip(rows, ("random", "model", "pixels"), strict=True):
        cells: list[Markup] = [tag("th", row["name"], scope="row")]
        for kind in ("probe", "knn"):
            share = row[f"{kind}_accuracy"]
            number = f"{100 * share:.1f} %"
            bar = tag(
                "span",
                tag("span", style=f"width:{100 * share:.1f}%;background:var(--{colour})"),
                class_="bar",
                aria_hidden="true",
            )
            strong = tag("strong", number) if share == best[kind] else number
            cells += [tag("td", strong, class_="number"), tag("td", bar, _chosen(row, kind))]
        body.append(tag("tr", *cells))
    samples = found["samples"]
    error = 100 * sqrt(0.25 / max(samples["test"], 1))
    heads = (
        tag("th", "Features", scope="col"),
        tag("th", "Linear probe", scope="colgroup", colspan=2),
        tag("th", "20 nearest neighbours", scope="colgroup", colspan=2),
    )
    table = tag(
        "table",
        tag("thead", tag("tr", *heads)),
        tag("tbody", *body),
    )
    trained, random = found["trained"]["probe_curve"], found["random"]["probe_curve"]
    blocks = [float(k + 1) for k in range(len(trained))]

    def percent(curve: list[list[float]], pooling: int) -> list[float | None]:
        return [100 * block[pooling] for block in curve]

    layers = chart(
        "Probe accuracy by block, validation split",
        blocks,
        [
            Curve("trained, patch mean", "model", percent(trained, 1), "-", "o"),
            Curve("trained, CLS", "model", percent(trained, 0), "--", "o"),
            Curve("random, patch mean", "random", percent(random, 1), "-", "s"),
            Curve("random, CLS", "random", percent(random, 0), "--", "s"),
        ],
        x_label="block",
        y_label="%",
        summary=_layers_text(found),
        levels=[("raw pixels", "pixels", 100 * found["pixels"]["probe_curve"][0][0])],
        integer_x=True,
        wide=True,
    )
    return tag(
        "section",
        title,
        tag("p", _verdict(found)),
        tag("div", table, class_="scroll"),
        tag(
            "p",
            f"Test accuracy on {samples['test']:,} images of {found['classes']} classes, fitted on "
            f"{samples['train']:,}; one standard error is at most {error:.1f} points. Block, "
            f"pooling and regularisation were chosen on {samples['validation']:,} validation "
            "images; the encoder is frozen. The probe is about as strong as BEiT’s own (100 epochs "
            "of AdamW); a less regularised one brings random and trained encoder closer together.",
            class_="note",
        ),
        tag("div", layers, class_="charts"),
    )


def _chosen(row: dict[str, Any], kind: str) -> Markup | None:
    layer, pooling = row[f"{kind}_layer"], row[f"{kind}_pooling"]
    if layer is None:
        return None
    words = {"cls": "CLS token", "mean": "patch mean"}
    return tag("span", f"block {layer}, {words.get(pooling, pooling)}", class_="note")


def _verdict(found: dict[str, Any]) -> str:
    gain = 100 * found["probe_gain"]
    pixels = 100 * (found["trained"]["probe_accuracy"] - found["pixels"]["probe_accuracy"])
    return (
        f"A linear classifier on the trained encoder is {abs(gain):.1f} points "
        f"{'better' if gain > 0 else 'worse'} than on the same encoder untrained, and "
        f"{abs(pixels):.1f} points {'better' if pixels > 0 else 'worse'} than on the raw pixels."
    )


def _layers_text(found: dict[str, Any]) -> str:
    parts = [
        f"block {k + 1}: {100 * max(block):.1f} %"
        for k, block in enumerate(found["trained"]["probe_curve"])
    ]
    return "Trained encoder, better pooling: " + ", ".join(parts) + "."
