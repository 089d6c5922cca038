"""The picture section: image, masked image, and two ways back from tokens."""

from __future__ import annotations

from fastbeit.report.markup import Markup, tag
from fastbeit.report.pictures import SHOWN_SIDE, data_address, hide_patches
from fastbeit.report.samples import ReportSamples

HEADS = ("Image", "Masked", "From its own tokens", "Masked tokens predicted")


def gallery(samples: ReportSamples | None) -> Markup:
    """A row an image; without a decoder the two reconstructions are replaced by a sentence."""
    title = tag("h2", "What the model fills in")
    if samples is None:
        text = "No pictures yet: they are made at the end of training."
        return tag("section", title, tag("p", text, class_="note"))
    drawn = samples.from_tokens is not None and samples.from_predicted is not None
    heads = HEADS if drawn else HEADS[:2]
    rows = []
    for row, name in enumerate(samples.names):
        right, masked = int(samples.right[row]), int(samples.masked[row])
        score = f"{right} of {masked} masked tokens right"
        hidden = hide_patches(samples.images[row], samples.positions[row], samples.grid)
        pictures = [
            _picture(samples.images[row], f"{name}: the image"),
            _picture(hidden, f"{name} with {masked} of {samples.tokens.shape[1]} patches hidden"),
        ]
        if samples.from_tokens is not None and samples.from_predicted is not None:
            pictures += [
                _picture(samples.from_tokens[row], f"{name} drawn from its own tokens"),
                _picture(
                    samples.from_predicted[row],
                    f"{name} drawn with the predicted tokens at the hidden patches; {score}",
                ),
            ]
        cells = (tag("td", picture) for picture in pictures)
        head = tag("th", name, tag("span", score, class_="note"), scope="row")
        rows.append(tag("tr", head, *cells))
    table = tag(
        "table",
        tag(
            "thead",
            tag(
                "tr", tag("th", "Sample", scope="col"), *(tag("th", h, scope="col") for h in heads)
            ),
        ),
        tag("tbody", *rows),
        class_="pictures",
    )
    if drawn:
        note = (
            "Third column: the tokenizer’s decoder draws the image’s own tokens, the best that "
            "tokens can do. Last column: the hidden patches’ tokens are the model’s guesses from "
            "what surrounds them. A wrong token often looks right: many codes mean nearly the same."
        )
    else:
        note = (
            "The tokenizer of this run has no decoder, so its tokens can’t be drawn; convert it "
            "together with its decoder’s file to see reconstructions here."
        )
    return tag("section", title, tag("p", note, class_="note"), tag("div", table, class_="scroll"))


def _picture(pixels, alt: str) -> Markup:
    height, width = pixels.shape[:2]
    small = width < SHOWN_SIDE // 2
    return tag(
        "img",
        src=data_address(pixels),
        alt=alt,
        width=SHOWN_SIDE,
        height=round(SHOWN_SIDE * height / width),
        class_="pixels" if small else None,
    )
