"""LoRA's seconds and gigabytes for other methods: benchmarks/budget_study.py."""

import sys

from peft_lessons.studies import load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import budget_study
from common import SEEDS, STEPS, Results

sys.path.remove(str(ROOT / "benchmarks"))


def test_lora_s_seconds_give_a_cheaper_method_more_steps_and_its_bytes_more_texts():
    standard = STEPS[budget_study.TASK], budget_study.BATCH
    steps = {method: budget_study.steps_within(method) for method in budget_study.METHODS}
    assert steps["qlora"] < standard[0] == steps["full"] < steps["pfeiffer"] < steps["last two"]
    rows = load_results("budget_study")
    for row in rows.itertuples():
        spends = (steps[row.method], standard[1]), (standard[0], row.batch)
        assert (row.steps, row.batch) == spends[budget_study.BUDGETS.index(row.budget)]
        assert (row.budget == "bytes") <= ((row.batch > standard[1]) == (row.method != "full"))
        assert row.seed in SEEDS
    for budget, seeds in (("seconds", SEEDS), ("bytes", SEEDS[:1])):
        found = rows[rows["budget"] == budget].groupby("seed").size()
        assert tuple(found.index) == tuple(seeds) and set(found) == {3}
    stored = Results("budget_study", budget_study.KEY, budget_study.COLUMNS)
    assert not stored.missing(budget_study.points())
