"""The studies of a prompt: tables that are complete, and searches that only go down."""

import sys

import pandas

from peft_lessons.studies import load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import prompt_study
from common import Results

sys.path.remove(str(ROOT / "benchmarks"))


def test_the_tables_have_every_point():
    turns = Results("prompt_turns", ("start", "control", "relative", "seed"), ())
    assert not turns.missing(prompt_study.turns())
    game = Results("prompt_game", ("way", "seed"), ())
    ways = [(way, seed) for way, seeds in prompt_study.GAME.items() for seed in range(seeds)]
    assert not game.missing(ways)


def numbers(rows, column: str):
    return pandas.to_numeric(rows[column], errors="coerce")


def test_a_control_holds_what_its_name_says():
    turns = load_results("prompt_turns")
    fixed = turns[turns["control"].isin(("norm fixed", "norm huge"))]
    assert (numbers(fixed, "norm_ratio") - 1).abs().max() < 1e-3
    frozen = turns[turns["control"] == "direction frozen"]
    # A factor below 0 turns a row by 180°, so the mean of 16 rows is a multiple of 180 / 16.
    turned = numbers(frozen, "angle") / (180 / 16)
    assert (turned - turned.round()).abs().max() < 0.02


def test_a_search_keeps_the_best_and_counts_what_it_tries():
    game = load_results("prompt_game")
    game = game[numbers(game, "evaluations").notna()]
    assert len(game) == 9 * len(prompt_study.NOTED)
    for _, rows in game.groupby(["way", "seed"]):
        tried, swaps, train = (numbers(rows, c) for c in ("evaluations", "swaps", "train"))
        assert tuple(tried) == prompt_study.NOTED and (swaps <= tried).all()
        assert train.is_monotonic_decreasing and swaps.is_monotonic_increasing
