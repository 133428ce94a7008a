"""The runs of the growing chart: all that its rule asks for, and a dot for each method."""

import sys

from peft_lessons.engine import method_facts
from peft_lessons.studies import Study, growing, load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import growing_study
from common import RUN, Results

sys.path.remove(str(ROOT / "benchmarks"))


def test_the_chart_lacks_no_run_and_every_dot_has_its_rate_inside_those_that_were_tried():
    results = Results("growing_study", ("task", "method", *RUN), growing_study.COLUMNS)
    assert not results.missing(growing_study.points(results))
    dots = {p.method for facts in method_facts().values() for p in facts.points}
    assert dots | {growing.HEAD.method, growing.FULL.method} == growing_study.DOTS.keys()
    study = Study.read("growing_study")
    chosen = growing._at_best(study).runs
    for method, (rates, *_) in growing_study.DOTS.items():
        runs = chosen[chosen["method"] == method]
        assert sorted(runs["seed"]) == [0, 1, 2] and runs["lr"].nunique() == 1
        assert min(rates) < runs["lr"].iloc[0] < max(rates)


def test_the_study_of_lesson_13_agrees_with_the_chart_on_the_runs_that_both_have():
    runs = load_results("choosing_study", task="sentiment", examples=6377)
    runs = runs[runs["method"] != "parallel"]  # another one: see choosing_study.NAMED
    both = runs.merge(load_results("growing_study"), on=["method", "lr", "seed"])
    off = (both["test_x"] - both["test_y"]).abs()
    assert len(off) > 40 and off.max() < 1.5 / 1740  # at most one sentence, by rounding
