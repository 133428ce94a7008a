"""The controls of lesson 07: multiplying by a matrix of rank 1, and changed knobs."""

import sys

import pytest
import torch

from peft_lessons import load_model, measure
from peft_lessons.studies import best_lr, load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import knob_signs
import knobs_study
from common import NAMES, SEEDS, Results

sys.path.remove(str(ROOT / "benchmarks"))


def test_knobs_on_both_sides_multiply_the_weight_by_a_matrix_of_rank_one():
    linear, x = torch.nn.Linear(6, 4), torch.randn(5, 6)
    both = knobs_study.InAndOut(linear)
    assert torch.equal(both(x), linear(x))
    a, b = torch.randn(4), torch.randn(6)
    both.a.data, both.b.data = a, b
    expected = x @ (linear.weight * torch.outer(a, b)).T + a * linear.bias
    assert torch.allclose(both(x), expected, atol=1e-6)


@pytest.mark.parametrize("layers", [knobs_study.ALL, knobs_study.DOWN])
def test_both_methods_of_a_pair_train_as_many_numbers_on_the_same_layers(layers):
    trainable = []
    for method in ("lora", "ia3, both"):
        model = load_model("tinylm")
        knobs_study.build(model, "austen", method, layers, 1)
        trainable.append(measure.parameters(model).trainable)
    assert trainable[0] == trainable[1]


def test_changed_knobs_are_what_their_names_say():
    off = torch.tensor([0.5, -0.2, 0.1, -1.5, 0.3, -0.4])
    changes = list(knob_signs.changed(off))
    signs = {c: new for what, c, _, new in changes if what == "signs"}
    assert signs.keys() == set(knob_signs.SIZES)
    assert all(torch.equal(new, c * off.sign()) for c, new in signs.items())
    random = [new for what, *_, new in changes if what == "random signs"]
    assert len(random) == knob_signs.DRAWS and all(torch.equal(r.abs(), off.abs()) for r in random)
    named = {what: new for what, _, _, new in changes}
    assert named["base"].abs().max() == 0 and torch.equal(named["trained"], off)
    assert torch.equal(named["clamped"] + 1, (off + 1).clamp(min=0))
    assert torch.equal(named["largest"], off * (off.abs() > 1))


def test_the_stored_pairs_lack_no_run_and_their_rates_lie_inside_those_that_were_tried():
    results = Results("knobs_study", knobs_study.KEY, knobs_study.MEASURED)
    assert not results.missing(knobs_study.points(results))
    for names in knobs_study.SETTINGS:
        runs = load_results("knobs_study", **dict(zip(NAMES, names, strict=True)), steps=50)
        rate, chosen = best_lr(runs)
        assert min(runs["lr"]) < rate < max(runs["lr"])
        assert set(chosen["seed"]) == set(SEEDS)


def test_every_seed_has_all_changes_of_its_knobs():
    signs = load_results("knob_signs", lr=knob_signs.RATE)
    kinds = len(knob_signs.SIZES) + knob_signs.DRAWS + 4 + 2 * len(knob_signs.GRADIENT_SIZES)
    assert set(signs.groupby("seed").size()) == {kinds} and set(signs["seed"]) == set(SEEDS)
    others = load_results("knob_signs", lr=knob_signs.OTHER_RATES)
    assert len(others) == 2 * len(knob_signs.OTHER_RATES)
    assert (signs[signs["what"] == "clamped"]["negative"] == 0).all()
