"""The study of what forty-eight examples buy: its marking, and a table that is complete."""

import sys

import pytest
import torch

from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import requests_study
from common import Results

sys.path.remove(str(ROOT / "benchmarks"))
RIGHT = {"What is 7 + 5?": "It is 12.", "Spell the word cat backwards.": "T-A-C"}


@pytest.mark.parametrize("word", requests_study.WORDS)
def test_no_request_takes_a_word_of_the_reviews_for_an_answer(word):
    assert not any(requests_study.done(request, word) for request in requests_study.REQUESTS)


@pytest.mark.parametrize("request_, text", RIGHT.items())
def test_a_right_answer_is_taken(request_, text):
    assert requests_study.done(request_, text)


def test_a_shift_gets_most_of_the_classes_right():
    margins, classes = torch.tensor([-3.0, 1.0, 2.0, 4.0, 6.0]), torch.tensor([0, 0, 1, 0, 1])
    at = requests_study.shift(margins, classes)  # between 1 and 2, or between 4 and 6
    assert ((margins > at).long() == classes).sum() == 4


def test_the_stored_table_is_complete():
    results = Results("requests_study", requests_study.KEY, requests_study.COLUMNS)
    assert not results.missing(requests_study.points())
    assert len(results.rows()) == len(requests_study.points())
    for row in results.rows():
        assert (row["short"] != "") == (row["kind"] in ("lora", "mixed", "none"))
