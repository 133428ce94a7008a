"""The map of a block, the growing chart, and explorers: what they say, and what they refuse."""

import itertools
import math
import re
import sys

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from peft_lessons import plots, table
from peft_lessons.engine import method_facts
from peft_lessons.studies import drawings, explore, figures, growing, growing_chart
from peft_lessons.studies.drawings import places

ALT = "A line that rises with the rank."


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures that were shown, each with its alternative text and its caption."""
    figs = []
    monkeypatch.setattr(figures, "still", lambda *args: figs.append(args[:3]))
    monkeypatch.setattr(figures, "display", lambda shown: None)
    return figs


def texts(fig):
    return [text.get_text() for ax in fig.axes for text in ax.texts]


# ------------------------------------------------------------------ drawings


@pytest.mark.parametrize("place", drawings.PLACES)
def test_only_the_named_place_is_lit(place, drawn):
    plots.block_map(place, caption="here")
    ((fig, alt, caption),) = drawn
    labels = {each.label for each in places().values()}
    assert labels & {*texts(fig)} == {places()[place].label, "head"}  # a head has its name always
    assert [name for name, each in places().items() if each.trains in alt] == [place]
    assert caption == "here"


def test_lora_is_lit_at_its_targets_only(drawn):
    plots.block_map("LoRA", targets=("query", "value"))
    ((fig, alt, _),) = drawn
    assert texts(fig).count("LoRA") == 2 and "A and B beside query and value." in alt
    plots.block_map("LoRA", targets=(name for name in ("query", "value")))
    assert texts(drawn[1][0]) == texts(fig)


@pytest.mark.parametrize(
    ("lit", "targets", "words"),
    [
        ("LoRA", ("query", "gate"), "'gate' must be one of query, key"),
        ("LoRA", "query", "targets='query' must be a sequence"),
        ("LoRA", (), r"targets=\(\) must be a sequence"),
        ("lora", ("query",), "'lora' must be one of prompt, prefix, LoRA, adapter"),
    ],
)
def test_an_unknown_place_or_linear_map_is_refused(lit, targets, words, drawn):
    with pytest.raises(ValueError, match=words):
        plots.block_map("head", lit, targets=targets)
    assert not drawn


def test_the_key_says_what_is_dashed(drawn):
    for lit, targets in (((), drawings.LINEAR_MAPS), ((), ["key"]), (["LoRA"], ["key"])):
        plots.block_map(*lit, targets=targets)
    fig, alt, _ = drawn[0]  # without a name all places are lit
    for place in places().values():
        assert place.label in texts(fig) and place.trains in alt
    keys = [next(t for t in texts(fig) if t.startswith("Colour")) for fig, *_ in drawn]
    assert "Dashed" not in keys[0] and "Dashed: where LoRA could" in keys[1]
    assert "Dashed: where other methods" in keys[2]


def test_the_picture_of_lora_names_its_parts(drawn):
    plots.lora_picture()
    ((fig, alt, caption),) = drawn
    assert {"A  (r, in)", "B  (out, r)", "r numbers", "× α/r"} <= {*texts(fig)}
    assert "frozen weight W" in alt and caption.startswith("LoRA: two thin")


def test_the_marks_of_dora_and_qlora_are_shown_where_they_are_named(drawn):
    for lit in ((), ("LoRA",), ("LoRA", "DoRA", "QLoRA"), ("DoRA",)):
        plots.block_map(*lit)
    assert [texts(fig).count("m") for fig, *_ in drawn] == [0, 0, 6, 0]
    packed = [sum("4 bit" in text for text in texts(fig)) for fig, *_ in drawn]
    assert packed == [0, 0, 7, 0]  # six linear maps and the key
    assert "Marked: the magnitudes m of DoRA" in drawn[2][1] and "Marked" not in drawn[0][1]


def test_places_take_the_colours_that_are_given(drawn):
    plots.block_map("prompt", "head", colors={"prompt": "#ff0000"})
    ((fig, *_),) = drawn
    edges = [to_hex(patch.get_edgecolor()) for patch in fig.axes[0].patches]
    assert "#ff0000" in edges and figures.COLORS[places()["head"].color].lower() in edges
    with pytest.raises(ValueError, match="'lora' must be one of"):
        plots.block_map("head", colors={"lora": "#ff0000"})


# ------------------------------------------------------------------ the growing chart


@pytest.mark.parametrize("lesson", ["00", "02", "06", "10", "12"])
def test_the_chart_names_what_a_lesson_knows_and_no_name_covers_another(lesson, drawn):
    growing_chart(lesson, "A title")
    ((fig, alt, caption),) = drawn
    (ax,) = fig.axes
    known = {growing.HEAD.label: "01"}
    known |= {p.label: facts.lesson for facts in method_facts().values() for p in facts.points}
    known = {label: number for label, number in known.items() if number <= max(lesson, "01")}
    assert {*texts(fig)} == {*known, growing.FULL.label} and ax.get_title() == "A title"
    bold = {text.get_text() for text in ax.texts if text.get_weight() == "bold"}
    assert bold == {name for name, number in known.items() if number == max(lesson, "01")}
    assert ("This lesson adds no point" in caption) == (not bold)
    assert ("Grey" in caption) == (lesson > "01")
    assert "full fine-tuning 87.3 % (22,566,146)" in alt
    assert all(f"{name} ".replace("\n", " ") in alt for name in known)
    fig.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = [p for line in ax.lines for p in line.get_transform().transform(line.get_xydata())]
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_the_reader_s_own_run_is_a_star_in_the_frame_and_no_dot_of_the_chart(drawn):
    growing_chart("02", mine=(74_498, 61.0))  # below the frame, and drawn at its edge
    ((fig, alt, caption),) = drawn
    (ax,) = fig.axes
    star = next(line for line in ax.lines if line.get_marker() == "*")
    assert star.get_markerfacecolor() == "white" and ax.get_ylim()[0] < star.get_ydata()[0] < 79
    assert "your run 61.0" in texts(fig) and "61.0 % (74,498)" in alt
    assert "One rule for every dot" in caption and "Star: your own run" in caption


def test_a_chart_of_an_unknown_lesson_or_an_impossible_run_is_refused():
    with pytest.raises(ValueError, match="'2' must be one of 00, 01, 02"):
        growing_chart("2")
    with pytest.raises(ValueError, match=r"mine=\(80.3, 74498\) must be"):
        growing_chart("02", mine=(80.3, 74_498))


# ------------------------------------------------------------------ explorers


def test_a_slider_shows_another_value_and_computes_it_once():
    pytest.importorskip("ipywidgets")
    asked = []

    def show(rank, init):
        asked.append((rank, init))
        return f"<p>{init} of rank {rank}</p>"

    explorer = explore(show, rank=(1, 2, 4), init=("normal", "zero"), start={"rank": 2})
    slider, menu, shown = explorer.widget.children
    assert asked == [(2, "normal")] and "<p>normal of rank 2</p>" in shown.value
    slider.value = 4
    assert "<p>normal of rank 4</p>" in shown.value
    assert explorer.values == {"rank": 4, "init": "normal"}
    menu.value, slider.value = "zero", 2
    menu.value, slider.value = "normal", 4
    assert "<p>normal of rank 4</p>" in shown.value
    assert asked == [*dict.fromkeys(asked)]
    assert type(slider).__name__ == "SelectionSlider" and type(menu).__name__ == "Dropdown"


def test_a_stored_explorer_is_the_start_and_a_line(monkeypatch):
    fig, _ = plots.figure()
    still = plots.still(fig, ALT)
    bundle, metadata = explore(lambda rank: still, start=8, rank=(1, 8))._repr_mimebundle_()
    line = "Run this cell in JupyterLab to move: rank 1, 8."
    assert bundle["text/html"] == still._repr_mimebundle_()[0]["text/html"] + f"<p>{line}</p>"
    assert bundle["text/plain"].endswith(line) and metadata == {"image/png": {"alt": ALT}}
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    explorer = explore(lambda rank: table([{"rank": rank}]), rank=range(1, 20))
    bundle, _ = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    assert "<table>" in bundle["text/html"] and "ipywidgets" in bundle["text/html"]
    assert repr(explorer).endswith("Install ipywidgets to move: rank 1, …, 19.")


def test_an_error_while_a_slider_moves_is_shown_and_forgotten():
    pytest.importorskip("ipywidgets")
    broken = [True]

    def show(rank):
        if rank == 2 and broken:
            raise RuntimeError("no <rank> 2")
        return f"rank {rank}"

    slider, shown = explore(show, rank=(1, 2)).widget.children
    slider.value = 2
    assert "RuntimeError: no &lt;rank&gt; 2" in shown.value and "&#x27;rank&#x27;: 2" in shown.value
    broken.clear()
    for slider.value in (1, 2):
        assert f"rank {slider.value}" in shown.value


@pytest.mark.parametrize(
    ("choices", "error", "words"),
    [
        ({}, ValueError, "name at least one choice"),
        ({"rank": ()}, ValueError, "rank has no values"),
        ({"rank": 8}, ValueError, "rank=8 must be a sequence"),
        ({"init": "zero"}, ValueError, "init='zero' must be a sequence"),
        ({"rank": (1, 2), "rate": (1.0, math.nan)}, ValueError, "rate has NaN among its values"),
        ({"fig": (Figure(),)}, TypeError, "returned Figure, which has no HTML. Return plots.s"),
        ({"rank": (1, 2), "start": 4}, ValueError, "start=4 of rank must be one of 1, 2"),
        ({"rank": (1,), "start": {"rang": 1}}, ValueError, "start names 'rang', the choices are r"),
        ({"rank": (1, 2), "scale": (1, 2), "start": 2}, ValueError, "start=2 names no choice"),
        ({"rank": (None,)}, TypeError, "show returned NoneType, which has no HTML"),
    ],
)
def test_an_explorer_that_cannot_be_is_refused(choices, error, words):
    with pytest.raises(error, match=re.escape(words)):
        explore(lambda **values: next(iter(values.values())), **choices)
