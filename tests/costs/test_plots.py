"""Figures: readable without sight, the same bytes each time, and no trace left behind."""

import base64
import io
import itertools
import re
import sys

import matplotlib as mpl
import pytest
from matplotlib.text import Text
from PIL import Image

from peft_lessons import plots
from peft_lessons.studies import Spread

ALT = 'Loss against steps: "full" falls faster than LoRA <r=8> & stays below it.'
LINES = {"LoRA": ([1, 2, 3], [3.0, 2.0, 1.5]), "full": ([1, 2, 3], [3.0, 1.5, 1.0])}
ROWS = {
    "full": {"weights": 4.0, "gradients": 4.0, "moments": 8.0},
    "LoRA": {"weights": 4.0, "adapter": 0.1},
}


@pytest.fixture
def displayed(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", shown.append)
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
    alt = re.search(r' alt="([^"]*)"', page).group(1)
    assert alt == ALT.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace(
        '"', "&quot;"
    )
    assert "<b>" not in page and "&lt;b&gt;tags" in page
    png = base64.b64decode(re.search(r"base64,([^\"]+)", page).group(1))
    assert png == shown.png and png.startswith(b"\x89PNG")
    assert ALT in bundle["text/plain"] and 'A "caption"' in bundle["text/plain"]
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    assert base64.b64decode(bundle["image/png"]) == png
    assert metadata == {"image/png": {"alt": ALT}}


@pytest.mark.parametrize("alt", ["", "a plot", "nineteen characters"])
def test_an_alt_text_that_says_nothing_is_refused(alt, displayed):
    with pytest.raises(ValueError, match="too short: say in a sentence"):
        plots.show(drawn()[0], alt)
    assert not displayed


def test_the_palette_keeps_the_colours_of_the_course(displayed):
    fig, ax = plots.figure()
    ax.bar(range(len(plots.COLORS)), 1, color=plots.COLORS)
    plots.show(fig, ALT)
    image = Image.open(io.BytesIO(displayed[0].png)).convert("RGB")
    found = {pixel for _, pixel in image.getcolors(2**16)}
    for color in plots.COLORS:
        wanted = tuple(bytes.fromhex(color[1:]))
        assert min(max(abs(a - b) for a, b in zip(wanted, p, strict=True)) for p in found) <= 3


def test_the_same_figure_gives_the_same_bytes(displayed):
    for _ in range(2):
        plots.show(drawn()[0], ALT)
    assert displayed[0].png == displayed[1].png
    assert b"Software" not in displayed[0].png and b"matplotlib" not in displayed[0].png
    fig, left, _ = drawn()
    left.set_title("Another")
    plots.show(fig, ALT)
    assert displayed[2].png != displayed[0].png


def test_no_global_state(displayed):
    before = dict(mpl.rcParams)
    plots.show(drawn()[0], ALT)
    assert dict(mpl.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_curves_label_everything():
    _, ax, _ = drawn()
    assert ax.get_title(loc="left") == "LoRA lags behind"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("steps", "loss (nats)")
    assert [line.get_label() for line in ax.lines] == list(LINES)
    assert [text.get_text() for text in ax.get_legend().texts] == list(LINES)
    assert [line.get_color() for line in ax.lines] == list(plots.COLORS[:2])
    assert [list(line.get_ydata()) for line in ax.lines] == [y for _, y in LINES.values()]


def test_one_curve_needs_no_legend():
    fig, ax = plots.figure()
    plots.curves(ax, {"only": ([1, 2], [2, 1])}, "One", "x", "y")
    assert ax.get_legend() is None and fig.axes == [ax]


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
    assert bars["adapter"] == [(16, 0), (4, pytest.approx(0.1))]
    assert ax.yaxis_inverted()  # the first row on top
    colors = [container[0].get_facecolor() for container in ax.containers]
    assert len(set(colors)) == 4


def test_the_style_holds_while_drawing():
    fig, left, right = drawn()
    for ax in (left, right):
        assert not ax.get_title(loc="center")
        assert ax.title.get_fontsize() == ax._left_title.get_fontsize()
        assert ax._left_title.get_fontweight() == "bold"
        assert not ax.get_legend().get_frame_on()
        assert not ax.spines["top"].get_visible()
    assert left.lines[0].get_linewidth() == 1.8
    assert fig.get_facecolor() == (1, 1, 1, 1)


def test_the_bytes_do_not_depend_on_the_readers_settings(displayed):
    plots.show(drawn()[0], ALT)
    with mpl.rc_context({"axes.titlelocation": "right", "lines.linewidth": 5, "font.size": 20}):
        plots.show(drawn()[0], ALT)
    assert displayed[0].png == displayed[1].png


def test_figures_of_any_grid():
    fig, axes = plots.figure(2, 3, size=(4, 3), sharex=True)
    assert axes.shape == (2, 3) and tuple(fig.get_size_inches()) == (4, 3)


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


def test_a_title_set_outside_stands_once_to_the_left_in_bold():
    fig, ax = plots.figure()
    ax.set(title="a claim")
    plots.show(fig, alt="an empty figure with a title")
    assert ax.get_title(loc="left") == "a claim" and ax.get_title(loc="center") == ""
    assert ax._left_title.get_fontweight() == "bold"


def test_names_beside_points_do_not_lie_on_one_another():
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


def test_no_line_runs_through_a_name():
    _, ax = plots.figure(size=(4, 3))
    points = {"first": (1, 5), "second": (3, 7), "third": (6, 8)}
    ax.set(xlim=(0, 10), ylim=(0, 10))
    (line,) = ax.step(*zip(*points.values(), strict=True), where="post")
    plots.name_points(ax, points)
    ax.figure.draw_without_rendering()
    path = line.get_transform().transform_path(line.get_path())
    for text in ax.texts:
        assert not path.intersects_bbox(Text.get_window_extent(text), filled=False)
