"""The splits of the sums, and the text that asks for one."""

import pytest

from peft_lessons.data.sums import EXAMPLES, sum_prompt, sums


def unordered(split: str) -> set[tuple[int, ...]]:
    return {tuple(sorted(pair)) for pair in sums(split)}


def test_no_pair_stands_on_two_sides_in_either_order():
    sides = [unordered(split) for split in ("train", "validation", "test", "larger")]
    sides.append({tuple(sorted(pair)) for pair in EXAMPLES})
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert [len(side) for side in sides[:3]] == [512, 100, 200]


def test_numbers_and_orders_of_each_split():
    for split in ("train", "validation", "test"):
        assert {n for pair in sums(split) for n in pair} <= set(range(10, 50))
        assert len(set(sums(split))) == len(sums(split)) and sums(split) == sums(split)
    assert {(b, a) for a, b in sums("train")} == set(sums("train"))
    assert len(sums("larger")) == 200 and all(49 < max(pair) < 100 for pair in sums("larger"))
    below = sum(a < b for a, b in sums("test"))
    assert 60 < below < 140  # neither order is the rule


def test_the_text_shows_as_many_examples_as_asked_for():
    assert sum_prompt(17, 36) == "38 + 15 = 53\n17 + 36 = "
    assert sum_prompt(17, 36, examples=0) == "17 + 36 = "
    assert sum_prompt(17, 36, examples=2) == "38 + 15 = 53\n21 + 46 = 67\n17 + 36 = "


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'dev', there are larger, test, train"):
        sums("dev")
