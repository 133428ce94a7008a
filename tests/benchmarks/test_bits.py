"""Rounding a base to few bits: sets of levels, rounding and undoing it, and the stored runs."""

import sys

import pytest
import torch
from tiny import tiny_llama

from peft_lessons.methods.qlora import NF4
from peft_lessons.studies import best_lr, load_results, paired_losses
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from bits_study import EVEN, FLOAT, NORMAL, ROUNDED, SHIFT, SIGNED, STRETCHES, Rounding, levels_of
from qlora_levels import rounded

sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(("levels", "bits"), ROUNDED)
def test_levels_ascend_to_one_and_hold_zero_and_as_many_as_the_codes(levels, bits):
    table = levels_of(levels, bits)
    assert len(table) == 2**bits - (levels == EVEN)
    assert (table.diff() > 0).all() and table[-1] == 1 and 0 in table
    if levels != NORMAL:
        assert torch.allclose(table.diff(), table.diff().mean())
    assert (table[0] == -1) == (levels != SIGNED)


def test_normal_float_of_four_bits_is_nf4():
    assert torch.allclose(levels_of(NORMAL, 4), NF4, atol=1e-6)


def test_a_signed_absmax_keeps_the_largest_weight_of_every_block_exactly():
    weight = torch.randn(32, 64)
    places = weight.abs().argmax(dim=1, keepdim=True)
    largest = weight.gather(1, places)
    assert (largest < 0).any() and (largest > 0).any()
    new, ratios, near = rounded(weight, levels_of(SIGNED, 3), signed=True)
    assert torch.equal(new.gather(1, places), largest) and (near.gather(1, places) == 1).all()
    assert (ratios.abs() <= 1).all()
    unsigned, *_ = rounded(weight, levels_of(EVEN, 3))
    assert (unsigned - weight).norm() > (new - weight).norm()


def test_a_base_is_rounded_anew_from_the_float_weights_and_given_back():
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rounding = Rounding(model)
    errors = [float(rounding.to(NORMAL, bits)) for bits in (3, 8, 3)]
    assert errors[0] == errors[2] > 4 * errors[1] > 0
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert len(changed) == len(rounding.linears) and not any("head" in n for n in changed)
    here = rounding.linears[0].weight.detach().clone()
    rounding.to(NORMAL, 3, SHIFT)
    assert not torch.equal(rounding.linears[0].weight, here)
    assert float(rounding.to(FLOAT, 32)) == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_stored_runs_are_paired_and_their_rate_is_the_best_of_those_tried():
    runs = load_results("bits_study", used="")
    tried = runs[(runs["levels"] == NORMAL) & (runs["bits"] == 3) & (runs["trained"] == "after")]
    rate, chosen = best_lr(tried)
    assert min(tried["lr"]) < rate < max(tried["lr"])
    assert set(runs[runs["trained"] != "not"]["lr"]) == set(tried["lr"])
    before = runs[(runs["levels"] == NORMAL) & (runs["bits"] == 3) & (runs["trained"] == "before")]
    gap = paired_losses(before, chosen)
    assert gap.n == STRETCHES and set(chosen["seed"]) == set(before["seed"]) >= {0, 1, 2}
    logs = before["test_loss"].mean() - chosen["test_loss"].mean()
    assert gap.mean == pytest.approx(100 * logs, abs=0.1)


def test_each_set_of_levels_has_eight_stored_roundings_of_one_error():
    draws = load_results("bits_roundings")
    several = draws[draws["levels"] != FLOAT].groupby(["model", "bits", "levels"])
    assert len(several) == 12 and set(several.size()) == {8}
    assert (several["error"].max() - several["error"].min() < 0.2).all()
    study = load_results("bits_study", trained="not", bits=(3, 4))
    here = draws[(draws["model"] == "tinylm") & (draws["offset"] == 0) & (draws["levels"] != FLOAT)]
    both = study.merge(here, on=["levels", "bits"])
    assert len(both) == 6 and (both["error_x"] - both["error_y"]).abs().max() < 0.002
