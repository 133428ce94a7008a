"""Words on colours: each with its number, in the picture and for those who cannot see it."""

import pytest

from peft_lessons.studies import text, words

LINES = [["a", "bad", "film"], ["life", "##less"]]
NUMBERS = [[0.2, -3.0, 0.0], [-1.0, -1.2]]


def test_the_alternative_text_reads_each_word_with_its_number():
    alt = words(LINES, {"random": NUMBERS, "trained": NUMBERS}, "z").alt
    assert alt.count("bad -3.0") == 2 and "random: a +0.2" in alt and "##less -1.2" in alt


def test_pieces_of_a_word_touch_and_words_do_not():
    (_, end, _), (start, _, less) = text._places(LINES[1])
    assert start == end and less == "less"
    places = text._places(LINES[0])
    assert places[1][0] - places[0][1] == text.GAP


def colors_of(values, limit=None):
    ax = text.figure()[1]
    text._draw(ax, LINES, values, limit or 3.0, 100)
    return [patch.get_facecolor() for patch in ax.patches]


def test_red_is_below_zero_and_blue_above_up_to_the_limit():
    above, below, none, *_ = colors_of([[1.5, -1.5, 0.0], [9.0, 3.0]])
    assert above[2] > above[0] and below[0] > below[2] and min(none[:3]) > 0.95
    *_, beyond, at_limit = colors_of([[1.5, -1.5, 0.0], [9.0, 3.0]])
    assert beyond == at_limit


@pytest.mark.parametrize(
    "values, message",
    [
        ([[0.2, -3.0], [-1.0, -1.2]], "a number for each word"),
        ({"trained": NUMBERS[:1]}, "trained needs"),
        ([[0.2, float("nan"), 0.0], [-1.0, -1.2]], "finite"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        words(LINES, values, "z")


def test_without_negative_numbers_the_scale_begins_at_zero(monkeypatch):
    monkeypatch.setattr(text, "still", lambda fig, *_: fig)
    shares = [[0.2, 0.9, 0.0], [0.5, 0.4]]
    assert words(LINES, shares, "share", limit=1.0).axes[-1].get_xlim() == (0, 1)
    assert words(LINES, NUMBERS, "z").axes[-1].get_xlim() == (-3, 3)
