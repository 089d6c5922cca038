"""The report's sections, each a function of the run's record; None where nothing is to be said."""

from __future__ import annotations

import json

from fastbeit.report.figures import Curve, chart
from fastbeit.report.markup import Markup, join, tag
from fastbeit.report.record import RunRecord
from fastbeit.training.progress import WAIT_WARNING_SHARE, format_duration

MOST_BAD_ROWS = 50


def tiles(run: RunRecord) -> Markup:
    """The numbers that a person looks for first."""
    found = []
    loss, chance = run.final("loss_nats"), run.final("chance_loss_nats")
    if loss is not None:
        detail = None
        if chance is not None:
            side = "below" if loss < chance else "above"
            text = f"{abs(chance - loss):.2f} {side} the position-only {chance:.2f}"
            detail = tag("span", text, class_="good" if loss < chance else "warn")
        found.append(_tile("Masked loss", f"{loss:.3f}", "nats", detail))
    accuracy, guess = run.final("accuracy"), run.final("chance_accuracy")
    if accuracy is not None:
        detail = None
        if guess is not None:
            points = 100 * (accuracy - guess)
            text = f"{points:+.1f} points on the position-only {100 * guess:.1f} %"
            detail = tag("span", text, class_="good" if points > 0 else "warn")
        found.append(_tile("Token accuracy", f"{100 * accuracy:.1f}", "%", detail))
    evaluation = run.summary.get("evaluation")
    if evaluation:
        gain = 100 * evaluation["probe_gain"]
        text = tag(
            "span",
            f"{gain:+.1f} points on the random encoder",
            class_="good" if gain > 0 else "warn",
        )
        probe = 100 * evaluation["trained"]["probe_accuracy"]
        found.append(_tile("Linear probe, test", f"{probe:.1f}", "%", text))
    used, size = run.final("codebook_used"), run.summary.get("codebook_size")
    if used is not None:
        perplexity = run.final("codebook_perplexity")
        parts = [f"of {size:,}"] if size else []
        parts += [f"perplexity {perplexity:,.0f}"] if perplexity is not None else []
        found.append(_tile("Codebook in use", f"{used:,.0f}", "codes", ", ".join(parts)))
    speed = run.typical("images_per_s")
    if speed is not None:
        wait = run.typical("data_wait_share")
        detail = f"{100 * wait:.0f} % waiting for data" if wait is not None else None
        found.append(_tile("Throughput", f"{speed:,.0f}", "images/s", detail))
    time_s, images = run.last("time_s"), run.last("images_seen")
    if time_s is not None:
        detail = f"{images:,.0f} images seen" if images is not None else None
        found.append(_tile("Training time", format_duration(time_s), "", detail))
    return tag("dl", *found, class_="tiles")


def _tile(label: str, value: str, unit: str, detail: object) -> Markup:
    return tag(
        "div",
        tag("dt", label),
        tag("dd", value, " ", tag("span", unit, class_="unit") if unit else None, class_="value"),
        tag("dd", detail, class_="detail") if detail is not None else None,
        class_="tile",
    )


def learning(run: RunRecord) -> Markup:
    """Loss, accuracy, learning rate, gradient norm, codebook, with the chance lines."""
    steps = [float(line["step"]) for line in run.metrics]
    if not steps:
        return tag("section", tag("h2", "Learning"), tag("p", "No step has been logged yet."))
    loss, chance = run.series("loss_nats"), run.series("chance_loss_nats")
    accuracy = [None if v is None else 100 * v for v in run.series("accuracy")]
    guess = [None if v is None else 100 * v for v in run.series("chance_accuracy")]
    charts = [
        chart(
            "Masked loss",
            steps,
            [Curve("model", "model", loss), Curve("position only", "chance", chance, "--")],
            x_label="step",
            y_label="nats",
            summary=_span(loss, "nats", ".3f", chance, "the position-only entropy"),
        ),
        chart(
            "Masked-token accuracy",
            steps,
            [Curve("model", "model", accuracy), Curve("position only", "chance", guess, "--")],
            x_label="step",
            y_label="%",
            summary=_span(accuracy, "%", ".1f", guess, "the best position-only guess"),
        ),
    ]
    for title, name, number in (
        ("Learning rate", "lr", ".2e"),
        ("Gradient norm before clipping", "grad_norm", ".2f"),
    ):
        values = run.series(name)
        if any(v is not None for v in values):
            charts.append(
                chart(
                    title,
                    steps,
                    [Curve(title, "extra", values)],
                    x_label="step",
                    y_label="",
                    summary=_span(values, "", number),
                    from_zero=True,
                )
            )
    used, perplexity = run.series("codebook_used"), run.series("codebook_perplexity")
    if any(v is not None for v in used):
        size = run.summary.get("codebook_size")
        charts.append(
            chart(
                "Codebook, all tokens seen so far",
                steps,
                [
                    Curve("codes in use", "pixels", used),
                    Curve("perplexity", "extra", perplexity, "--"),
                ],
                x_label="step",
                y_label="codes",
                summary=f"Codes in use: {_span(used, '', ',.0f')} "
                f"Perplexity: {_span(perplexity, '', ',.1f')}",
                levels=[("all codes", "muted", size)] if size else (),
                from_zero=True,
            )
        )
    validation = run.summary.get("validation")
    held_out = None
    if validation:
        held_out = tag(
            "p",
            f"On {validation['images']:,} held-out images: masked loss "
            f"{validation['loss_nats']:.3f} nats, accuracy {100 * validation['accuracy']:.1f} %.",
        )
    return tag(
        "section",
        tag("h2", "Learning"),
        tag(
            "p",
            "The dashed lines are what somebody reaches who knows only where a patch lies, not "
            "what surrounds it: the entropy of the token given its position, and always guessing "
            "the position’s commonest token. Both are fitted in hindsight to the very tokens seen "
            "so far, which makes them strict, most of all early on.",
            class_="note",
        ),
        held_out,
        tag("div", *charts, class_="charts"),
    )


def _span(
    values: list[float | None],
    unit: str,
    number: str,
    level: list[float | None] | None = None,
    level_name: str = "",
) -> str:
    """``From 5.500 to 2.900 nats; 0.400 below the chance line at the end.``"""
    known = [v for v in values if v is not None]
    if not known:
        return "No finite value was logged."
    unit = f" {unit}" if unit else ""
    text = f"From {known[0]:{number}} at the start to {known[-1]:{number}}{unit} at the end"
    ends = [v for v in level or [] if v is not None]
    if ends:
        gap = known[-1] - ends[-1]
        text += f", {abs(gap):{number}} {'below' if gap < 0 else 'above'} {level_name}"
    return text + "."


def throughput(run: RunRecord) -> Markup | None:
    """Speed over the run, and what limits it."""
    speed, wait = run.series("images_per_s"), run.series("data_wait_share")
    if not any(v is not None for v in speed):
        return None
    steps = [float(line["step"]) for line in run.metrics]
    percent = [None if v is None else 100 * v for v in wait]
    charts = [
        chart(
            "Throughput",
            steps,
            [Curve("images/s", "model", speed)],
            x_label="step",
            y_label="images/s",
            summary=_span(speed, "images/s", ",.0f"),
            from_zero=True,
        ),
        chart(
            "Share of the time waiting for data",
            steps,
            [Curve("waiting", "chance", percent)],
            x_label="step",
            y_label="%",
            summary=_span(percent, "%", ".1f"),
            from_zero=True,
        ),
    ]
    typical_wait, mfu = run.typical("data_wait_share"), run.typical("mfu")
    rows: list[tuple[str, str]] = [("Images/s, median", f"{run.typical('images_per_s'):,.1f}")]
    step_ms = run.typical("step_ms")
    if step_ms is not None:
        rows.append(("Step, median", f"{step_ms:,.1f} ms"))
    if typical_wait is not None:
        slow = typical_wait > WAIT_WARNING_SHARE
        verdict = "the loader is the bottleneck" if slow else "not held up by the loader"
        rows.append(("Waiting for data, median", f"{100 * typical_wait:.1f} %: {verdict}"))
    if mfu is None:
        rows.append(("Model FLOPs utilisation", "not stated: the peak of this device is not known"))
    else:
        peak = run.summary.get("mfu_peak")
        rows.append(
            ("Model FLOPs utilisation", f"{100 * mfu:.1f} %" + (f" of {peak}" if peak else ""))
        )
    skipped = run.last("skipped_steps")
    if skipped is not None:
        rows.append(("Steps skipped (not finite)", f"{skipped:,.0f}"))
    return tag(
        "section",
        tag("h2", "Throughput"),
        tag("div", *charts, class_="charts"),
        tag("div", _pairs(rows), class_="scroll"),
    )


def bad_samples(run: RunRecord) -> Markup:
    """Samples that could not be read, with their reasons."""
    title = tag("h2", "Bad samples")
    if not run.bad_samples:
        return tag("section", title, tag("p", "None: every sample could be read.", class_="note"))
    keys = [k for k in ("index", "path", "reason", "substitute") if k in run.bad_samples[0]]
    heads = {"index": "Sample", "path": "Path", "reason": "Reason", "substitute": "Replaced by"}
    rows = [
        tag(
            "tr",
            *(
                tag("td", tag("code", record.get(k, "")) if k == "path" else record.get(k, ""))
                for k in keys
            ),
        )
        for record in run.bad_samples[:MOST_BAD_ROWS]
    ]
    hidden = len(run.bad_samples) - len(rows)
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", heads[k], scope="col") for k in keys))),
        tag("tbody", *rows),
    )
    return tag(
        "section",
        title,
        tag("p", f"{len(run.bad_samples):,} could not be used; the next good sample stood in."),
        tag("div", table, class_="scroll"),
        tag("p", f"{hidden:,} more in bad_samples.jsonl.", class_="note") if hidden > 0 else None,
    )


def details(run: RunRecord) -> Markup:
    """Final numbers, configuration and versions, folded."""
    environment = run.samples.environment if run.samples else {}
    plain = {
        key: value
        for key, value in run.summary.items()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
    }
    numbers = [
        (key, f"{value:,.6g}" if isinstance(value, float) else str(value))
        for key, value in plain.items()
    ]
    text = json.dumps(run.config, indent=2, ensure_ascii=False)
    return tag(
        "section",
        tag("h2", "Details"),
        tag("details", tag("summary", "Final numbers"), _pairs(numbers)) if numbers else None,
        tag("details", tag("summary", "Configuration"), tag("pre", text)) if run.config else None,
        tag(
            "details",
            tag("summary", "Versions"),
            _pairs(list(environment.items())),
            open=True,
        )
        if environment
        else None,
        tag("p", "Not read: ", join(*(tag("span", p, " ") for p in run.problems)), class_="warn")
        if run.problems
        else None,
    )


def _pairs(rows: list[tuple[str, str]]) -> Markup:
    body = (tag("tr", tag("th", key, scope="row"), tag("td", value)) for key, value in rows)
    return tag("table", tag("tbody", *body), class_="plain")
