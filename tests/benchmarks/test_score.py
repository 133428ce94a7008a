"""The runs on AdaLoRA's score: all that is asked for, and maps that are what their names say."""

import math
import sys

import pytest
import torch

from peft_lessons.studies import best_lr, load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import score_study
from common import SEEDS

sys.path.remove(str(ROOT / "benchmarks"))
SIZES = torch.tensor([384, 288, 288, 384, 704, 704, 704])  # parameters of one LoRA rank
RUNS = load_results("score_study")


def ranks(row) -> torch.Tensor:
    return torch.tensor([[int(digit, 36) for digit in block] for block in row.ranks.split()])


def the(split: str, seed: int, method: str = "lora"):
    """Return the run with a seed at the split's best learning rate."""
    _, runs = best_lr(RUNS[(RUNS["method"] == method) & (RUNS["split"] == split)])
    return runs[runs["seed"] == seed].iloc[0]


def test_the_table_lacks_no_run_and_its_best_rates_lie_inside_those_that_were_tried():
    results = score_study.table()
    asked = score_study.points(results)
    assert not results.missing(asked) and len(asked) == len(RUNS)
    for names in score_study.TUNED:
        rates, best = score_study.chosen(results, *names)
        assert min(rates) < best < max(rates)


def test_a_row_s_parameters_and_its_perplexity_follow_from_its_map_and_its_losses():
    for row in RUNS.itertuples():
        triplets = ranks(row).sum().item()
        kept = (ranks(row) * SIZES).sum().item() + triplets * (row.method == "adalora")
        assert row.kept == kept
        losses = [float(loss) for loss in row.losses.split()]
        assert len(losses) == 20  # of groups in which a few blocks are short
        assert row.test == pytest.approx(math.exp(sum(losses) / 20), rel=1e-3)
        if row.method == "adalora":
            assert triplets == 42


@pytest.mark.parametrize("seed", SEEDS)
def test_lora_spends_the_maps_that_its_rows_name(seed):
    found = ranks(the("S", seed, "adalora"))
    for score in ("S", "magnitude", "random"):
        assert torch.equal(ranks(the(f"map of {score}", seed)), ranks(the(score, seed, "adalora")))
    other = the("S", (seed + 1) % 3, "adalora")
    assert torch.equal(ranks(the("another seed", seed)), ranks(other))
    for split in ("shuffled 1", "shuffled 2", "shuffled 3"):
        shuffled = ranks(the(split, seed))
        assert not torch.equal(shuffled, found)
        assert torch.equal(shuffled.flatten().sort().values, found.flatten().sort().values)
    assert torch.equal(ranks(the("4 × map of S", seed)), 4 * found)
    within = ranks(the("blocks shuffled", seed))
    assert torch.equal(within.sort(dim=0).values, found.sort(dim=0).values)
    assert not torch.equal(within, found)
    assert ranks(the("S in its layer", seed, "adalora")).eq(1).all()
