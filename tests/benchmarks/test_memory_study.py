"""Memory that was predicted, and what was measured of it on one machine."""

import sys

from peft_lessons.studies import load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory_study
from common import Results

sys.path.remove(str(ROOT / "benchmarks"))


def test_the_formula_is_what_torch_allocates_or_a_little_less_and_linux_sees_more():
    results = Results("memory_study", memory_study.KEY, memory_study.COLUMNS)
    assert not results.missing(memory_study.SETTINGS)
    for row in load_results("memory_study").itertuples():
        low, high = (0.98, 1.01) if row.method == "LoRA" else (0.99, 1.09)
        assert low < row.allocated / row.formula < high, row
        assert row.allocated < row.resident < 1.75 * row.formula, row


def test_the_stored_predictions_are_those_of_today():
    stored = load_results("memory_study").iloc[0]
    today = memory_study.predicted(memory_study.SETTINGS[0])
    assert today == {name: stored[name] for name in ("formula", "traced")}
