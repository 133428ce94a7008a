"""Figures: readable without sight, the same bytes each time, and no trace left behind."""

import base64
import html
import itertools
import re

import matplotlib as mpl
import pytest
from matplotlib.text import Text

from peft_lessons import plots
from peft_lessons.studies import Spread, figures

ALT = 'Loss against steps: "full" falls faster than LoRA <r=8> & stays below it.'
LINES = {"LoRA": ([1, 2, 3], [3.0, 2.0, 1.5]), "full": ([1, 2, 3], [3.0, 1.5, 1.0])}
ROWS = {
    "full": {"weights": 4.0, "gradients": 4.0, "moments": 8.0},
    "LoRA": {"weights": 4.0, "adapter": 0.1},
}


@pytest.fixture
def displayed(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    return shown


def drawn():
    fig, (left, right) = plots.figure(1, 2)
    plots.curves(left, LINES, "LoRA lags behind", "steps", "loss (nats)")
    plots.stacked_bars(right, ROWS, "Moments cost most", "bytes a number")
    return fig, left, right


def test_alt_text_is_there_and_escaped(displayed):
    plots.show(drawn()[0], ALT, 'A "caption" with <b>tags</b> & signs')
    (shown,) = displayed
    bundle, metadata = shown._repr_mimebundle_()
    page = bundle["text/html"]
    assert page.count("<img ") == page.count(" alt=") == page.count("<figcaption>") == 1
    assert html.unescape(re.search(r' alt="([^"]*)"', page)[1]) == ALT
    assert "<b>" not in page and "&lt;b&gt;tags" in page
    png = base64.b64decode(re.search(r"base64,([^\"]+)", page).group(1))
    assert png == shown.png and png.startswith(b"\x89PNG")
    assert ALT in bundle["text/plain"] and 'A "caption"' in bundle["text/plain"]
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    assert base64.b64decode(bundle["image/png"]) == png
    assert metadata == {"image/png": {"alt": ALT}}


def test_an_alt_text_that_says_nothing_is_refused(displayed):
    with pytest.raises(ValueError, match="too short: say in a sentence"):
        plots.show(drawn()[0], "nineteen characters")
    assert not displayed


def test_the_same_figure_gives_the_same_bytes_whatever_the_reader_sets(displayed):
    before = dict(mpl.rcParams)
    plots.show(drawn()[0], ALT)
    assert dict(mpl.rcParams) == before
    with mpl.rc_context({"axes.titlelocation": "right", "lines.linewidth": 5, "font.size": 20}):
        plots.show(drawn()[0], ALT)
    assert displayed[0].png == displayed[1].png
    assert b"Software" not in displayed[0].png and b"matplotlib" not in displayed[0].png


def test_curves_label_everything():
    _, ax, _ = drawn()
    assert ax.get_title(loc="left") == "LoRA lags behind"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("steps", "loss (nats)")
    assert [line.get_label() for line in ax.lines] == list(LINES)
    assert [text.get_text() for text in ax.get_legend().texts] == list(LINES)

    assert [list(line.get_ydata()) for line in ax.lines] == [y for _, y in LINES.values()]


def test_stacked_bars_label_everything():
    _, _, ax = drawn()
    assert ax.get_title(loc="left") == "Moments cost most"
    assert ax.get_xlabel() == "bytes a number"
    assert [label.get_text() for label in ax.get_yticklabels()] == list(ROWS)
    parts = ["weights", "gradients", "moments", "adapter"]
    assert [text.get_text() for text in ax.get_legend().texts] == parts
    assert [text.get_text().strip() for text in ax.texts] == ["16", "4.1"]
    bars = {c.get_label(): [(b.get_x(), b.get_width()) for b in c] for c in ax.containers}
    assert bars["moments"] == [(8, 8), (4, 0)]
    assert ax.yaxis_inverted()  # the first row on top


def test_spreads_draw_the_mean_and_the_range():
    _, ax = plots.figure()
    plots.spreads(ax, {1: Spread(80, 78, 83, 3), 8: Spread(85, 84.5, 86, 3)}, "rank")
    line, _, (bars,) = ax.containers[0]
    assert line.get_xdata().tolist() == [1, 8] and line.get_ydata().tolist() == [80, 85]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[78, 83], [84.5, 86]]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["rank"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "8"]


def test_a_logarithmic_axis_is_marked_where_it_is_told_and_keeps_its_range():
    _, ax = plots.figure()
    ax.plot([1, 2], [30, 110])
    plots.log_axis(ax, "y", (0.001, 40, 100, 16384))
    low, high = ax.get_ylim()
    assert ax.get_yscale() == "log" and ax.get_xscale() == "linear"
    assert 20 < low < 30 and 110 < high < 150
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.001", "40", "100", "16384"]
    assert not ax.yaxis.get_ticklocs(minor=True).size


def test_names_next_to_points_cover_neither_one_another_nor_a_line():
    _, ax = plots.figure(size=(4, 3))
    points = {f"method {n}": (1 + n / 1000, 2.0) for n in range(6)} | {"far": (9, 8)}
    ax.set(xlim=(0, 10), ylim=(0, 10))
    plots.name_points(ax, points)
    ax.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without their ties
    assert [text.get_text() for text in ax.texts][-1] == "far" and len(boxes) == 7
    gaps = sorted(box.y0 for box in boxes)
    height = min(box.height for box in boxes)
    assert all(b - a > 0.8 * height for a, b in itertools.pairwise(gaps))
    assert ax.texts[0].xy == points["method 0"]
    _, ax = plots.figure(size=(4, 3))
    ax.set(xlim=(0, 10), ylim=(0, 10))
    (line,) = ax.step([1, 3, 6], [5, 7, 8], where="post")
    plots.name_points(ax, {"first": (1, 5), "second": (3, 7), "third": (6, 8)})
    ax.figure.draw_without_rendering()
    path = line.get_transform().transform_path(line.get_path())
    boxes = map(Text.get_window_extent, ax.texts)
    assert not any(path.intersects_bbox(box, filled=False) for box in boxes)
