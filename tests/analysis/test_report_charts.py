"""Figures of a report: axes, drawings, opacity of heat maps; escaping and tables of its HTML."""

import base64
import html as standard
import io
import math
import re
import xml.etree.ElementTree as tree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image

from moejax.analysis.report import html
from moejax.analysis.report.charts import (
    Forest,
    HeatMap,
    Interval,
    Line,
    LineChart,
    tick_label,
    ticks,
)
from moejax.analysis.report.files import draw
from moejax.analysis.report.style import DARK, LIGHT
from moejax.analysis.report.svg import ABOVE, BELOW, figure, gallery, paint

MARKUP = "<b onclick='x'>&\"$1_</b>"


def chart(lines, **changes) -> LineChart:
    return LineChart("name", "A title", "A caption.", "x", "y", lines, **changes)


def drawing(chart_) -> tree.Element:
    """The SVG within a figure, which has to be well-formed."""
    whole = str(figure(chart_))
    return tree.fromstring(re.search("<svg.*?</svg>", whole, re.S)[0])


@settings(max_examples=200, deadline=None)
@given(low=st.floats(-1e12, 1e12), span=st.floats(1e-3, 1e12), count=st.integers(2, 8))
def test_ticks_are_round_and_inside(low, span, count):
    span = max(span, abs(low) * 1e-6)
    found = ticks(low, low + span, count)
    slack = 1e-6 * span
    assert all(low - slack <= value <= low + span + slack for value in found)
    assert 1 <= len(found) <= 2.2 * count + 2
    labels = [tick_label(value, found[1] - found[0]) for value in found] if len(found) > 1 else []
    if span > abs(low) / 100:
        assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("value", "spacing", "label"),
    [(0.0, 1.0, "0"), (20_000, 10_000, "20k"), (2_500_000, 500_000, "2.5M"), (3.5, 0.5, "3.5"),
     (-0.05, 0.05, "-0.05"), (3e11, 1e11, "300G"), (2e-5, 1e-5, "2e-5")],
)  # fmt: skip
def test_labels_of_ticks(value, spacing, label):
    assert tick_label(value, spacing) == label
    money = tick_label(value, spacing, money=True)
    assert money == (f"-${label[1:]}" if label.startswith("-") else f"${label}")


def test_counted_axes_have_no_ticks_between():
    assert ticks(1, 3, 4, whole=True) == [1, 2, 3]


def test_ticks_of_a_logarithmic_axis():
    assert ticks(1, 1000, 4, log=True) == [1, 10, 100, 1000]
    assert ticks(3, 40, 4, log=True) == [5, 10, 20]
    assert len(ticks(1.1, 1.6, 4, log=True)) >= 3  # less than a decade


def test_a_line_chart_keeps_gaps_bands_and_labels():
    x = np.arange(5.0)
    y = np.array([3.0, 2.0, math.nan, 1.5, 1.0])
    found = drawing(chart([Line("one", x, y, (y - 0.1, y + 0.1)), Line("two", x, y + 1)],
                          references=[("gzip", 2.5)]))  # fmt: skip
    curves = [part.get("d") for part in found.iter() if "curve" in (part.get("class") or "")]
    assert len(curves) == 2 and all(curve.count("M") == 2 for curve in curves)
    texts = ["".join(part.itertext()) for part in found.iter("text")]
    assert {"x", "y", "gzip"} <= set(texts)
    assert "one ends at 1" in found.get("aria-label") and found.get("role") == "img"


def test_the_start_of_a_curve_does_not_flatten_the_rest():
    x = np.linspace(0, 100, 101)
    y = 1 + 50 * np.exp(-x)
    cut, whole = chart([Line("", x, y)], cut_start=True), chart([Line("", x, y)])
    assert cut.limits[1][1] < 1.5 < 50 < whole.limits[1][1]
    assert cut.cuts and not whole.cuts
    assert "above the frame" in str(figure(cut)) and "above the frame" not in str(figure(whole))


def test_a_curve_of_the_start_alone_is_not_cut_off():
    lines = [Line("a", np.array([1.0]), np.array([9.0])), Line("b", np.array([99.0]), np.ones(1))]
    assert chart(lines, cut_start=True).limits[1][1] > 9


@pytest.mark.parametrize("y", [[], [2.0], [math.nan], [2.0, 2.0]])
def test_charts_of_next_to_nothing(y):
    values = np.array(y, float)
    found = drawing(chart([Line("", np.arange(len(values), dtype=float), values)]))
    assert not {"nan", "inf"} & set(re.findall("nan|inf", tree.tostring(found, "unicode")))


def heat(values, **changes) -> HeatMap:
    values = np.array(values, float)
    rows, columns = ([str(i) for i in range(n)] for n in values.shape)
    kept = {"scale": "diverging", "top": 2.0} | changes
    return HeatMap("h", "Heat", "", values, rows, columns, "expert", "layer", **kept)


def test_heat_maps_are_read_back_from_their_pixels():
    values = np.array([[0.0, 0.5, 1.0], [1.5, 2.0, 9.0], [math.nan, 1.0, 1.0]])
    found = drawing(heat(values))
    first = next(found.iter("image")).get("href")
    pixels = image.imread(io.BytesIO(base64.b64decode(first.split(",")[1])))
    assert pixels.shape == (3, 3, 4)
    # Even load is clear, so that the page's ground shows; the rest is opaque by its distance.
    assert pixels[..., 3] == pytest.approx(
        np.array([[1, 0.5, 0], [0.5, 1, 1], [0, 0, 0]]), abs=0.01
    )
    assert (255 * pixels[0, 0, :3]).round().tolist() == list(BELOW)
    assert (255 * pixels[1, 1, :3]).round().tolist() == list(ABOVE)
    assert paint(values, "sequential", 2.0)[1, 1, 3] == 255


def test_names_of_rows_and_columns_are_thinned_out():
    found = drawing(heat(np.ones((64, 256))))
    texts = ["".join(part.itertext()) for part in found.iter("text")]
    assert "0" in texts and len(texts) < 45


def test_a_forest_of_open_and_missing_intervals():
    rows = [Interval("a", -0.1, -0.2, -0.05, "good", "better"),
            Interval("b", 0.0, -math.inf, math.inf, "unsure", "cannot tell"),
            Interval("c", math.nan, math.nan, math.nan)]  # fmt: skip
    found = drawing(Forest("f", "Differences", "", rows, "bits", margin=0.01))
    dots = [part for part in found.iter() if (part.get("class") or "").startswith("dot ")]
    assert [dot.get("class") for dot in dots] == ["dot good", "dot unsure"]
    assert "nan" not in tree.tostring(found, "unicode").split("aria-label")[0]
    ratios = Forest("f", "Times", "", [Interval("a", 1.3, 1.1, 1.6)], "times", zero=1.0, log=True)
    assert "1.3 (1.1 to 1.6)" in drawing(ratios).get("aria-label")


def test_no_figures_leave_no_gallery():
    assert gallery([]) == ""


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_text_is_never_markup(text):
    made = html.tag("td", text, title=text)
    body = made.removeprefix("<td").removesuffix("</td>")
    assert "<" not in body and body.count(">") == 1
    made.encode()  # no half of a surrogate pair
    shown = standard.unescape(body.partition(">")[2])
    assert len(shown) == len(text) and all(a in (b, "\ufffd") for a, b in
                                           zip(shown, text, strict=True))  # fmt: skip


def test_markup_in_every_place_of_a_figure(tmp_path):
    lines = [Line(MARKUP, np.arange(3.0), np.arange(3.0)), Line("b", np.arange(3.0), np.ones(3))]
    line = LineChart("n", MARKUP, MARKUP, MARKUP, MARKUP, lines, [(MARKUP, 1.0)])
    forest = Forest("f", MARKUP, MARKUP, [Interval(MARKUP, 1, 0, 2, text=MARKUP)], MARKUP)
    names = [MARKUP] * 2
    map_ = HeatMap("h", MARKUP, MARKUP, np.ones((2, 2)), names, names, MARKUP, MARKUP,
                   "sequential", 1.0)  # fmt: skip
    for one in (line, forest, map_):
        assert "<b" not in figure(one)
        drawing(one)
    for path in draw([line, forest, map_], tmp_path, ["svg"]):
        assert "<b onclick" not in path.read_text()
        tree.parse(path)


def test_tables_have_headings_with_scope():
    made = html.table(["name", "n"], [["a", 1], ["b" * 60, html.badge("x", "good")]], label="T",
                      emphasis=[1])  # fmt: skip
    assert made.count('scope="col"') == 2 and made.count('scope="row"') == 2
    assert 'aria-label="T"' in made and 'class="sum"' in made and 'class="long"' in made


def contrast(one: str, other: str) -> float:
    """The contrast of two colours by WCAG 2.1."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_of_text_and_curves(theme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    grounds = {"ground": ("text", "muted", "link", "good", "bad", "unsure"),
               "panel": ("text", "muted"), "code": ("text",), "good-ground": ("good",),
               "bad-ground": ("bad",), "unsure-ground": ("unsure", "text")}  # fmt: skip
    for ground, texts in grounds.items():
        for text in texts:
            assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
    for i in range(8):
        assert contrast(theme[f"c{i}"], theme["ground"]) >= 3, i
