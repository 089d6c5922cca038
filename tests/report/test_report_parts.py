"""Markup, figures and pictures, each alone."""

import base64
import io
import math
import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from fastbeit.report.figures import Curve, chart, thin
from fastbeit.report.markup import Markup, join, tag
from fastbeit.report.pictures import data_address, hide_patches
from fastbeit.report.samples import ReportSamples, fill


def test_tags_escape_children_and_attributes_but_not_markup():
    inner = tag("b", "a < b & c")
    assert inner == "<b>a &lt; b &amp; c</b>"
    assert tag("p", inner, class_="x", hidden=True, id=None) == f'<p class="x" hidden>{inner}</p>'
    assert tag("img", alt='"><script>') == '<img alt="&quot;&gt;&lt;script&gt;">'
    assert join("<", None, 3, Markup("<br>")) == "&lt;3<br>"
    assert tag("a", name="n", aria_label="l") == '<a name="n" aria-label="l"></a>'


def test_thinning_keeps_means_and_gaps():
    assert thin([1, 2, 3], [5.0, None, 7.0])[0] == [1, 2, 3]
    ys = thin([1, 2, 3], [5.0, None, 7.0])[1]
    assert ys[0] == 5.0 and math.isnan(ys[1]) and ys[2] == 7.0
    xs, ys = thin(list(range(10)), [1.0, 3.0, 5.0, None, None, None, 2.0, 2.0, 2.0, 8.0], most=4)
    assert xs == [1.0, 4.0, 7.0, 9.0]
    assert ys[0] == 3.0 and math.isnan(ys[1]) and ys[2:] == [2.0, 8.0]


def test_charts_carry_their_text_and_no_fixed_size():
    svg = chart(
        "Loss <1>",
        [1.0, 2.0],
        [Curve("a", "model", [1.0, 2.0])],
        x_label="step",
        y_label="nats",
        summary="Up.",
    )
    assert 'aria-label="Loss &lt;1&gt;. Up."' in svg
    assert "<figcaption>Loss &lt;1&gt;</figcaption>" in svg
    assert "viewBox" in svg and "<metadata" not in svg and "<?xml" not in svg
    assert ">nats</text>" in svg  # text stays text
    head = svg[svg.index("<svg") : svg.index(">", svg.index("<svg"))]
    assert "width" not in head and "height" not in head
    again = chart(
        "Loss <1>",
        [1.0, 2.0],
        [Curve("a", "model", [1.0, 2.0])],
        x_label="step",
        y_label="nats",
        summary="Up.",
    )
    assert svg == again


def _decode(address: str) -> tuple[str, np.ndarray]:
    head, body = address.split(",", 1)
    return head, np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


def test_small_pictures_are_exact_and_photographs_are_jpeg():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, size=(28, 28, 3), dtype=np.uint8)
    head, pixels = _decode(data_address(small))
    assert head == "data:image/png;base64" and np.array_equal(pixels, small)
    grey = rng.integers(0, 256, size=(28, 28, 1), dtype=np.uint8)
    assert np.array_equal(_decode(data_address(grey))[1], grey[..., 0])
    photo = rng.integers(0, 256, size=(224, 224, 3), dtype=np.uint8)
    assert _decode(data_address(photo))[0] == "data:image/jpeg;base64"


def test_masked_patches_are_hatched_and_nothing_else_changes():
    image = np.zeros((28, 42, 3), dtype=np.uint8)
    image[..., 1] = 200
    shown = hide_patches(image, np.array([0, 5, -1]), (2, 3))
    assert shown.shape == (28 * 5, 42 * 5, 3)
    patches = shown.reshape(2, 70, 3, 70, 3).transpose(0, 2, 1, 3, 4).reshape(6, -1, 3)
    for number, patch in enumerate(patches):
        if number in (0, 5):
            assert set(np.unique(patch)) == {120, 150}
        else:
            assert (patch == [0, 200, 0]).all()


def test_fill_replaces_only_filled_slots():
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    positions = torch.tensor([[0, 2], [-1, 1]], dtype=torch.int32)
    filled = fill(tokens, positions, torch.tensor([[7, 8], [9, 0]]))
    assert filled.tolist() == [[7, 2, 8], [4, 0, 6]]


def test_samples_survive_a_round_trip_and_count_right_tokens(tmp_path):
    samples = ReportSamples(
        images=np.zeros((1, 4, 4, 3), np.uint8),
        positions=np.array([[0, 2, 3, -1]], np.int32),
        tokens=np.array([[5, 6, 7, 8]]),
        predicted=np.array([[5, 7, 1, 5]]),
        from_tokens=None,
        from_predicted=None,
        grid=(2, 2),
        names=["ü.png"],
        environment={"torch": "2"},
    )
    assert samples.masked.tolist() == [3] and samples.right.tolist() == [2]
    samples.save(tmp_path / "s.npz")
    loaded = ReportSamples.load(tmp_path / "s.npz")
    assert loaded.names == ["ü.png"] and loaded.grid == (2, 2) and loaded.from_tokens is None
    assert np.array_equal(loaded.predicted, samples.predicted)


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, fastbeit.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
