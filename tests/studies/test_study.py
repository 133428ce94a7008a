"""Stored tables: runs are picked, compared and shown with where they were measured."""

import math
import re

import pandas as pd
import pytest
import torch

from peft_lessons import Study, studies, table
from peft_lessons.studies import auc, best_lr, paired_answers, provenance, stored_costs, student_t

ROWS = [{"way": "LoRA", "n": 74498, "time": 0.12345}, {"way": "a <b>", "n": 3, "time": None}]
STAMP = {"machine": "one core", "torch": "2", "date": "2026-01-01"}


def runs(*rows, **more):
    """Return runs of these (learning rate, seed, validation, test)."""
    found = pd.DataFrame(rows, columns=["lr", "seed", "validation", "test"])
    return found.assign(task="sentiment", trainable=1234, **STAMP | more)


MINE = runs((0.1, 0, 0.8, 0.85), (0.1, 1, 0.7, 0.83), (0.01, 0, 0.6, 0.9))


def study(**ways):
    return Study(pd.concat([found.assign(way=way) for way, found in ways.items()]))


# ------------------------------------------------------------------ tables


def test_a_table_is_aligned_text_and_escaped_html():
    shown = table(ROWS, {"time": "{:.1f} s"}, note="one thread")
    assert repr(shown).splitlines() == [
        "way         n   time",
        "LoRA   74,498  0.1 s",
        "a <b>       3",
        "one thread",
    ]
    page = shown._repr_html_()
    assert "a &lt;b&gt;" in page and '<td style="text-align:right">74,498</td>' in page
    for rows, formats, message in (
        ([], {}, "no rows"),
        ([{"a": 1}, {"b": 1}], {}, "the first has"),
        ([{"a": 1}], {"c": "{}"}, "names 'c'"),
    ):
        with pytest.raises(ValueError, match=message):
            table(rows, formats)


# ------------------------------------------------------------------ reading


@pytest.fixture
def results(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.setenv("PEFT_LESSONS_DATA", str(tmp_path))
    return tmp_path / "results"


def test_runs_are_read_filtered_and_named(results):
    lines = "lora,,0.001,0,0.5,0.50\nlora,,0.003,1,nan,0.52\nfull,x,0.001,0,0.6,0.6\n"
    (results / "runs.csv").write_text(
        f"method,targets,lr,seed,validation,test\n{lines}", encoding="utf-8"
    )
    first = studies.load_results("runs", method="lora", targets="").iloc[0].to_dict()
    assert first == dict(
        task="sentiment", method="lora", targets="", lr=0.001, seed=0, validation=0.5, test=0.5
    )
    found = Study.read("runs", lr=(0.003, 0.001))
    assert len(found.runs) == 3 and math.isnan(found.runs["validation"][1])
    ways = found.named({"all": {"method": "full"}, "low": {"method": "lora", "lr": 0.001}})
    assert list(ways) == list(ways.runs["way"]) == ["all", "low"]
    assert ways["low"]["test"].tolist() == [0.5] and list(ways.where(seed=0)) == list(ways)
    for call, error, message in (
        (lambda: studies.load_results("nope"), FileNotFoundError, "there are: runs"),
        (lambda: found.where(rank=8), ValueError, "no column 'rank'"),
        (lambda: found.named({"none": {"lr": 7}}), ValueError, "no run is 'none'"),
        (lambda: ways["other"], KeyError, "other"),
    ):
        with pytest.raises(error, match=message):
            call()


# ------------------------------------------------------------------ statistics


def test_mean_and_range_over_seeds():
    found = studies.mean_and_range(MINE[:2], "test", 100)
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((84, 83, 85, 2))
    assert repr(found) == "84.0 (83.0 to 85.0, 2 seeds)"
    assert repr(studies.Spread(38.04, 38.04, 38.04, 1)) == "38.0 (1 seed)"
    for wrong, message in ((MINE[:0], "matches nothing"), (MINE, "seed 0 occurs twice")):
        with pytest.raises(ValueError, match=message):
            studies.mean_and_range(wrong, "test")


def test_the_learning_rate_is_chosen_by_validation_of_the_first_seed():
    tried = runs((0.1, 0, 0.8, 0), (0.1, 1, 0.1, 0), (0.3, 0, 0.7, 9), (0.3, 1, 0.9, 9))
    rate, found = best_lr(tried)
    assert rate == 0.1 and found["seed"].tolist() == [0, 1]
    assert best_lr(tried.assign(task="austen"))[0] == 0.3, "of perplexities the lower one"
    assert best_lr(pd.concat([tried, runs((0.01, 0, 0.8, 0))]))[0] == 0.01, "of equals the smaller"
    with pytest.raises(ValueError, match="every run with seed 0"):
        best_lr(tried[1:2])


def test_a_difference_is_paired_by_seed():
    known = {1: 12.7062, 2: 4.3027, 9: 2.2622, 30: 2.0423, 10**4: 1.9602}
    assert {n: student_t(n) for n in known} == pytest.approx(known, abs=1e-4)
    a = runs((0, 0, 0, 0.84), (0, 1, 0, 0.86), (0, 2, 0, 0.85))
    b = runs((0, 2, 0, 0.80), (0, 0, 0, 0.80), (0, 1, 0, 0.80), (0, 7, 0, 0.1))
    found = studies.paired_difference(a, b, scale=100)
    half = 4.302653 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((5, 5 - half, 5 + half))
    assert found.n == 3 and found.is_clear and repr(found) == "+5.0 (+2.5 to +7.5, 3 seeds)"
    one = studies.paired_difference(a[:1], b)
    assert not one.is_clear and one.high == math.inf and repr(one) == "+0.0 (1 seed)"
    with pytest.raises(ValueError, match="no seed in common"):
        studies.paired_difference(a, b[3:])


def answers(*flags):
    """Return runs that get these sentences right; the first sentence is the last bit."""
    return pd.DataFrame([{"sentences": 4, "right": f"{int(each, 2):x}"} for each in flags])


def test_answers_are_paired_sentence_by_sentence():
    # Shares of 100, 50, 0, 100 % against 0, 50, 0, 100 %: gaps of 100, 0, 0, 0.
    found = paired_answers(answers("1011", "1001"), answers("1010", "1000"))
    half = student_t(3) * 50 / 2
    assert (found.mean, found.n) == (25, 4)
    assert found.low == pytest.approx(25 - half)
    assert repr(found) == "+25.0 (-54.6 to +104.6, 4 sentences)"
    assert paired_answers(answers("0111"), answers("0111")).mean == 0


def test_answers_of_other_sentences_are_not_paired():
    more = answers("1011").assign(sentences=5)
    for first, second, said in (
        (answers("1011"), more, "4 and 5"),
        (answers("1011")[:0], more, "matches nothing"),
        (pd.concat([answers("1011"), more]), more, r"\[4, 5\]"),
    ):
        with pytest.raises(ValueError, match=said):
            paired_answers(first, second)


def test_losses_are_paired_answer_by_answer():
    mine = pd.DataFrame({"losses": ["1.000 2.000 3.000", "1.200 2.000 3.000"]})
    theirs = pd.DataFrame({"losses": ["1.000 1.900 3.100"]})
    found = studies.paired_losses(mine, theirs)  # gaps of 10, 10 and -10 hundredths
    half = student_t(2) * math.sqrt(400 / 3) / math.sqrt(3)
    assert (found.mean, found.high) == pytest.approx((10 / 3, 10 / 3 + half))
    assert repr(found) == "+3.3 (-25.4 to +32.0, 3 answers)"
    with pytest.raises(ValueError, match="3 and 2 answers"):
        studies.paired_losses(mine, pd.DataFrame({"losses": ["1.000 2.000"]}))


def test_the_front_is_what_nothing_dominates():
    points = {"a": (1.0, 0.5), "b": (2.0, 0.5), "c": (2.0, 0.7), "d": (3.0, 0.7), "e": (0.5, 0.1)}
    assert studies.pareto_front(points) == ["e", "a", "c"]
    assert studies.pareto_front(points | {"n": (0.1, math.nan), "m": (math.nan, 9.0)}) == [
        "e",
        "a",
        "c",
    ]


def test_provenance_names_the_first_and_the_last_day_of_all_rows():
    late, early = runs((0, 0, 0, 0), date="2026-11-24"), runs((0, 0, 0, 0), date="2025-12-31")
    assert provenance(MINE, late, early) == "one core · torch 2 · 2025-12-31 to 2026-11-24"
    assert provenance(MINE) == "one core · torch 2 · 2026-01-01"
    other = runs((0, 0, 0, 0), machine="two cores", torch="3")
    assert provenance(MINE, other) == "one core, two cores · torch 2, 3 · 2026-01-01"


# ------------------------------------------------------------------ comparing


def test_a_comparison_shows_each_way_at_its_best_learning_rate():
    ways = study(mine=MINE, base=MINE[2:].assign(lr=0.0, date="2026-02-02"))
    lines = repr(ways.compare({"seeds": len})).splitlines()
    assert lines[0].split("  ")[0] == "minilm, movie sentiment, 200 steps"
    assert "learning rate" in lines[0]
    assert "84.0 (83.0 to 85.0, 2 seeds)" in lines[1] and lines[1].split()[1:3] == ["1,234", "0.1"]
    assert lines[2].split() == ["base", "1,234", "1", "90.0"]
    assert lines[3] == "one core · torch 2 · 2026-01-01 to 2026-02-02"
    with pytest.raises(ValueError, match="'sentiment', 'austen'"):
        study(mine=MINE, other=MINE.assign(task="austen")).compare()


def test_every_learning_rate_that_was_tried_is_shown_with_its_scores():
    lines = repr(study(mine=MINE, other=MINE[:1].assign(lr=1.0)).by_lr()).splitlines()
    assert re.findall(r"lr \S+", lines[0]) == ["lr 0.01", "lr 0.1", "lr 1"]
    assert lines[1].split()[1:] == ["60.0", "/", "90.0", "80.0", "/", "85.0"]
    assert lines[2].split()[1:] == ["80.0", "/", "85.0"]


@pytest.mark.parametrize("task, count", [("sentiment", 4), ("austen", 3)])
def test_ways_are_listed_among_the_references_of_their_task(task, count):
    least, *others = references = Study.references(task)
    assert len(others) == count - 1 and others[-1] == "full fine-tuning"
    scores = references.scores()
    assert all(s.n == 3 for name, s in scores.items() if not name.startswith("base"))
    ways = study(mine=MINE.assign(task=task)).with_references()
    assert list(ways) == [least, "mine", *others] and ways.scores().items() > scores.items()
    with pytest.raises(ValueError, match="must be one of"):
        Study.references("french")


def test_a_study_says_what_it_holds_and_what_it_lacks():
    runs = Study.read("dora_study")
    assert repr(runs) == f"Study of {len(runs.runs)} runs"
    assert "ways 'DoRA'" in repr(runs.named({"DoRA": {"method": "dora"}}))
    assert len(runs.where(seed=[0]).runs) == len(runs.where(seed=(0,)).runs) > 0
    for ask, told in (
        (runs.compare, "the ways have no names yet"),
        (runs.where(seed=99).compare, "there are no runs"),
        (lambda: runs.named({}), "name at least one way"),
    ):
        with pytest.raises(ValueError, match=told):
            ask()


# ------------------------------------------------------------------ costs


def test_stored_costs_of_the_named_methods():
    text = repr(stored_costs("minilm", {"lora": "LoRA, rank 8, query and value"}))
    assert "on minilm" in text and "74,498" in text and "MiB" in text
    assert "forward pass, 1 text" in text and "32 texts" in text
    assert "generation, 1 text" in repr(stored_costs("tinylm", {"full": "full"}))
    assert "32 texts" not in repr(stored_costs("tinylm", {"full": "full"}, answers=False))
    with pytest.raises(ValueError, match="no row 'bitfit' for tinylm, ours; it has full"):
        stored_costs("tinylm", {"bitfit": "BitFit"})
    lines = repr(studies.against_peft("minilm", {"lora": "LoRA", "ia3": "(IA)³"})).splitlines()
    assert lines[0].split("  ")[0] == "a step on minilm" and "PEFT's" in lines[0]
    ours, theirs = (float(n) for n in re.findall(r"(\d+) ms", lines[1]))
    assert float(lines[1].split()[-2]) == pytest.approx(ours / theirs, abs=0.02)


def test_auc_counts_the_pairs_that_are_ranked_rightly():
    scores, labels = torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([1, 1, 0, 0])
    assert auc(scores, labels) == 3.5 / 4 and auc(-scores, labels) == 0.5 / 4
    with pytest.raises(ValueError, match="a positive and a negative"):
        auc(scores, torch.ones(4))
