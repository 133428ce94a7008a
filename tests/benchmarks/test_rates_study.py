"""The studies of lesson 14: tables that are complete, and rates inside those tried."""

import sys

import torch

from peft_lessons.studies import load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import plane_study
import rates_study
from common import SEEDS, Results

sys.path.remove(str(ROOT / "benchmarks"))
PLANE, RUNS = load_results("plane_study"), load_results("rates_study")


def test_the_plane_is_complete_and_each_line_has_three_seeds_at_a_rate_inside_those_tried():
    results = Results("plane_study", plane_study.KEY, plane_study.COLUMNS)
    assert not results.missing(plane_study.points(results))
    for ratio in plane_study.CENTERS:
        line = PLANE[PLANE["ratio"] == ratio]
        first = line[line["seed"] == SEEDS[0]].set_index("lr")["validation"]
        assert first.index.min() < first.idxmin() < first.index.max()
        assert sorted(line[line["lr"] == first.idxmin()]["seed"]) == list(SEEDS)


def test_every_method_has_its_seeds_and_its_best_rate_inside_those_tried():
    asked = {(task, method) for task, each in rates_study.METHODS.items() for method in each}
    assert {tuple(row) for row in RUNS[["task", "method"]].to_numpy()} == asked
    for (task, method), runs in RUNS.groupby(["task", "method"]):
        assert sorted(runs["seed"]) == list(rates_study.SEEDS) and runs["rates"].nunique() == 1
        losses = torch.tensor([[float(x) for x in row.split()] for row in runs["losses"]])
        assert losses.shape[1] == len(runs["rates"].iloc[0].split())
        assert 0 < losses.mean(0).argmin() < losses.shape[1] - 1, (task, method)


def test_what_is_frozen_had_no_gradient():
    for method in ("LoRA 16", "VeRA 64"):
        whole, frozen = (
            RUNS[(RUNS["task"] == "austen") & (RUNS["method"] == name)]["gradient"].tolist()
            for name in (method, f"{method}, frozen")
        )
        assert whole == frozen
