"""The study of rewards: what each reward pays for, and that its table is whole."""

import sys

import pytest
import torch

from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import rewards_study
from common import SEEDS, Results

sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("text", "pays"),
    [
        ("53\n", {"exact", "number", "occurs", "swapped"}),
        ("53", {"occurs", "swapped"}),
        ("54\n", {"number"}),
        ("53 feet.\n", {"occurs"}),
        ("3\n", {"number", "swapped"}),
        ("\n", {"swapped"}),
        ("five\n", set()),
    ],
)
def test_each_reward_pays_for_what_its_name_says(text, pays):
    rewards = {"exact": rewards_study.exact} | rewards_study.REWARDS
    assert {name for name, reward in rewards.items() if reward(text, 17, 36)} == pays


def test_a_row_keeps_each_sum():
    row = rewards_study.tested(torch.tensor([0.1, 1.0, 0.0]), torch.tensor([False, True, True]))
    assert (row["chances"], int(row["right"], 16)) == ("100 0 900", 0b110)
    assert row["greedy"] == "0.6667"


def test_the_stored_table_lacks_no_run_and_its_rates_lie_inside_those_that_were_tried():
    results = Results("rewards_study", rewards_study.KEY, rewards_study.COLUMNS)
    rows = results.rows()
    assert not results.missing(rewards_study.points(results))
    for arm, size in rewards_study.LEARNERS:
        runs = [row for row in rows if (row["arm"], row["size"]) == (arm, str(size))]
        tried = {float(row["lr"]): float(row["validation"]) for row in runs if row["seed"] == "0"}
        best = max(tried, key=tried.get)
        assert min(tried) < best < max(tried)
        seeds = {int(row["seed"]) for row in runs if float(row["lr"]) == best}
        assert seeds == set(SEEDS)


def test_the_curves_of_a_run_have_a_number_for_each_step():
    for row in Results("rewards_study", rewards_study.KEY, rewards_study.COLUMNS).rows():
        for name in rewards_study.CURVES:
            steps = 0 if row["arm"] in ("base", "other", "mode", "sft") else int(row["steps"])
            assert len(row[name].split()) == steps
