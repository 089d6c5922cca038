"""The page: complete, self-contained, safe against names, and renderable from files alone."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastbeit.batch import MimBatch
from fastbeit.report import render_report, write_report
from fastbeit.report.__main__ import main

ATTACK = '<script>alert("x")</script>'
GRID, PATCH, CODES = (2, 3), 4, 5


class Model(torch.nn.Module):
    """Predicts code (position + 1) mod CODES: right nowhere but at patch 4, where it says 4."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(grid=GRID)

    def forward(self, images, positions):
        wanted = (positions.long().clamp(min=0) + 1) % CODES
        wanted = wanted.masked_fill(positions == 4, 4)
        return torch.nn.functional.one_hot(wanted, CODES).float() * self.weight


class Tokens(torch.nn.Module):
    """Code = patch number; drawn as grey of that level."""

    def __init__(self, decoder=True):
        super().__init__()
        self.has_decoder = decoder

    def encode(self, token_images, positions=None):
        assert positions is None
        return torch.arange(GRID[0] * GRID[1]).remainder(CODES).repeat(len(token_images), 1)

    def decode(self, tokens):
        if not self.has_decoder:
            raise ValueError("this tokenizer holds no decoder")
        grey = (tokens.float() / CODES)[:, None].repeat(1, 3, 1, 1)
        return torch.nn.functional.interpolate(grey, scale_factor=PATCH)


def _batch(images: int = 2) -> MimBatch:
    size = (GRID[0] * PATCH, GRID[1] * PATCH)
    positions = torch.tensor([[0, 4, -1], [1, 2, 5]], dtype=torch.int32)[:images]
    return MimBatch(
        images=torch.zeros(images, 3, *size),
        token_images=torch.zeros(images, 3, *size),
        positions=positions,
        drop_scale=None,
        index=torch.tensor([7, 11])[:images],
    )


CONFIG = {
    "recipe": "demo",
    "model": {"width": 32, "depth": 2},
    "data": {"data": f"/photos/{ATTACK}", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def _row(name: str, probe: float, knn: float, layer: int | None) -> dict:
    curve = [[probe - 0.03, probe - 0.02], [probe - 0.01, probe]] if layer else [[probe]]
    pooling = "mean" if layer else None
    return {
        "name": name,
        "probe_accuracy": probe,
        "probe_layer": layer,
        "probe_pooling": pooling,
        "probe_l2": 1e-3,
        "probe_curve": curve,
        "knn_accuracy": knn,
        "knn_layer": layer,
        "knn_pooling": pooling,
        "knn_curve": curve,
    }


SUMMARY = {
    "recipe": "demo",
    "loss_nats": 2.875,
    "codebook_size": 256,
    "mfu_peak": "989 TFLOP/s, bf16 dense",
    "validation": {"images": 1200, "loss_nats": 2.9, "accuracy": 0.415},
    "evaluation": {
        "random": _row("random encoder", 0.6, 0.5, 2),
        "trained": _row("trained encoder", 0.79, 0.75, 2),
        "pixels": _row("raw pixels", 0.84, 0.8, None),
        "samples": {"train": 10000, "validation": 1200, "test": 1200},
        "classes": 10,
        "probe_gain": 0.19,
        "beats_pixels": False,
    },
}


def _run_folder(folder: Path, *, steps: int = 30) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [
        {
            "step": 10 * (k + 1),
            "loss_nats": None if k == 3 else 5.0 - 0.05 * k,
            "accuracy": 0.2 + 0.005 * k,
            "chance_loss_nats": 3.4,
            "chance_accuracy": 0.3,
            "lr": 1e-3 * math.cos(k / 30),
            "grad_norm": 1.0,
            "images_per_s": 400.0 + k,
            "step_ms": 300.0,
            "data_wait_share": 0.4,
            "mfu": 0.31,
            "codebook_used": 200,
            "codebook_perplexity": 88.0,
            "skipped_steps": 1,
            "images_seen": 1280 * (k + 1),
            "time_s": 3.0 * (k + 1),
        }
        for k in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    bad = {"path": f"/photos/{ATTACK}.jpg", "index": 3, "reason": "truncated", "substitute": 4}
    (folder / "bad_samples.jsonl").write_text(json.dumps(bad) + '\n{"torn')
    return folder


class Page(HTMLParser):
    """Every element that was opened, their nesting, and all text."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.stack, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.stack == [], f"left open: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style",):
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    folder = _run_folder(tmp_path_factory.mktemp("report") / "run-1")
    names = [f"{ATTACK}.png", "b.png"]
    path = write_report(
        folder, model=Model(), tokenizer=Tokens(), batch=_batch(), config=CONFIG, names=names
    )
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_every_section_and_number_is_there(html):
    text = " ".join("".join(Page(html).text).split())
    for part in (
        "BEiT pre-training: demo",
        "run-1: 300 steps",
        "2.875 nats",
        "0.52 below the position-only 3.40",
        "34.5 %",
        "+4.5 points on the position-only 30.0 %",
        "79.0 %",
        "+19.0 points on the random encoder",
        "200 codesof 256, perplexity 88",
        "On 1,200 held-out images: masked loss 2.900 nats, accuracy 41.5 %",
        "is 19.0 points better than on the same encoder untrained",
        "5.0 points worse than on the raw pixels",
        "one standard error is at most 1.4 points",
        "block 2, patch mean",
        "40.0 %: the loader is the bottleneck",
        "31.0 % of 989 TFLOP/s, bf16 dense",
        "truncated",
        "1 of 2 masked tokens right",
        torch.__version__,
    ):
        assert part in text, part
    assert "No pictures yet" not in text and "Not evaluated" not in text


def test_it_needs_nothing_from_outside(html):
    page = Page(html)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for tag, attributes in page.elements:
        for key in ("src", "href", "action", "data", "srcset"):
            if key in attributes:
                assert attributes[key].startswith(("data:image/", "#")), (tag, key, attributes[key])
    assert not re.search(r"url\(\s*['\"]?(?!#)", html) and "@import" not in html
    assert "http://" not in html and "https://" not in html


def test_names_from_outside_are_text_not_html(html):
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 3  # path of the bad sample, sample name, configuration
    names = [a["alt"] for a in Page(html).all("img")]
    assert any(ATTACK in alt for alt in names)  # whole, as an attribute's text


def test_pictures_have_descriptions_and_headings_are_in_order(html):
    page = Page(html)
    images = page.all("img")
    assert len(images) == 8 and all(image["alt"] for image in images)
    figures = [a["aria-label"] for t, a in page.elements if a.get("role") == "img"]
    assert len(figures) == 8
    loss = next(label for label in figures if label.startswith("Masked loss"))
    assert loss == (
        "Masked loss. From 5.000 at the start to 3.550 nats at the end, "
        "0.150 above the position-only entropy."
    )
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1 and len(page.all("h2")) == 6
    assert all(head.get("scope") for head in page.all("th") if head)
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    clips = re.findall(r"url\(#([^)]+)\)", html)
    assert set(clips) <= set(identifiers)


def test_both_themes_are_served_by_variables(html):
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"#0000[01]\d", html)  # matplotlib's marker colours are all replaced
    assert "var(--model)" in html and "var(--chance)" in html


def test_rendering_again_needs_only_the_folder_and_gives_the_same(tmp_path, capsys):
    folder = _run_folder(tmp_path / "run")
    first = write_report(
        folder, model=Model(), tokenizer=Tokens(), batch=_batch(), config=CONFIG
    ).read_bytes()
    (folder / "report.html").unlink()
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_bytes() == first


def test_a_run_with_metrics_only_says_what_is_missing(tmp_path):
    folder = _run_folder(tmp_path / "run", steps=1)
    for name in ("config.json", "summary.json", "bad_samples.jsonl"):
        (folder / name).unlink()
    html = render_report(folder).read_text(encoding="utf-8")
    text = "".join(Page(html).text)
    assert "No pictures yet" in text and "Not evaluated" in text
    assert "10 steps so far" in text and "every sample could be read" in text


def test_damaged_files_are_named_on_the_page(tmp_path):
    folder = _run_folder(tmp_path / "run", steps=0)
    (folder / "summary.json").write_text("{")
    (folder / "report_samples.npz").write_bytes(b"PK nothing")
    text = "".join(Page(render_report(folder).read_text(encoding="utf-8")).text)
    assert "summary.json can't be read" in text
    assert "report_samples.npz holds no report samples" in text
    assert "No step has been logged yet" in text


def test_a_folder_that_is_no_run_exits_with_2(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err


def test_without_a_decoder_the_page_says_so(tmp_path):
    folder = _run_folder(tmp_path / "run", steps=2)
    path = write_report(
        folder, model=Model(), tokenizer=Tokens(decoder=False), batch=_batch(), config=CONFIG
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.all("img")) == 4
    assert "has no decoder" in "".join(page.text)


def test_summary_given_wins_over_the_file_and_long_runs_stay_small(tmp_path):
    folder = _run_folder(tmp_path / "run", steps=5000)
    path = write_report(
        folder,
        model=Model(),
        tokenizer=Tokens(),
        batch=_batch(1),
        config=CONFIG,
        summary={"loss_nats": 1.25},
    )
    text = "".join(Page(path.read_text(encoding="utf-8")).text)
    assert "1.250 nats" in text and "Not evaluated" in text
    assert path.stat().st_size < 400_000


def test_the_model_and_tokenizer_see_whole_images_once(tmp_path):
    folder = _run_folder(tmp_path / "run", steps=2)
    model = Model().train()
    write_report(folder, model=model, tokenizer=Tokens(), batch=_batch(), config=CONFIG)
    assert model.training
    with np.load(folder / "report_samples.npz", allow_pickle=False) as file:
        assert file["predicted"].tolist() == [[1, 4, 1], [2, 3, 1]]
        assert file["tokens"][0].tolist() == [0, 1, 2, 3, 4, 0]
        grey = file["from_predicted"][0, ::PATCH, ::PATCH, 0].astype(float) * CODES / 255
        # Patch 0 takes the predicted code 1, patch 4 its own; the empty slot changes nothing.
        assert grey.round().astype(int).tolist() == [[1, 1, 2], [3, 4, 0]]
        assert (file["images"] == 128).all()  # 0 * 0.5 + 0.5, denormalised
