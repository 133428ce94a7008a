"""The controls of lesson 07: multiplying by a matrix of rank 1, and changed knobs."""

import sys

import pytest
import torch

from peft_lessons import load_model, measure
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import knob_signs
import knobs_study

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
