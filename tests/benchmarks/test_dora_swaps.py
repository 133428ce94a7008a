"""The swapped lengths and directions of lesson 04: what each weight is made of, and the table."""

import sys

import torch

from peft_lessons.studies import load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import dora_swaps
from common import Results

sys.path.remove(str(ROOT / "benchmarks"))


def test_every_weight_has_the_directions_and_the_lengths_that_its_name_says():
    torch.manual_seed(0)
    W, m = torch.randn(6, 8), torch.rand(6) + 0.5
    change = torch.randn(6, 3) @ torch.randn(3, 8)
    V = W + change
    made = dora_swaps.replacements(W, V, m)
    expected = {  # {name: (directions of, lengths)}
        "trained": (V, m),
        "base": (W, W.norm(dim=1)),
        "directions": (V, W.norm(dim=1)),
        "lengths": (W, V.norm(dim=1)),
        "undivided": (V, V.norm(dim=1)),
        "magnitudes": (W, m),
    }
    assert made.keys() == expected.keys()
    for name, (directions, lengths) in expected.items():
        assert torch.allclose(made[name].norm(dim=1), lengths)
        assert torch.allclose(torch.cosine_similarity(made[name], directions, dim=1), torch.ones(6))
    of_lora = dora_swaps.replacements(W, V, None)
    assert torch.equal(of_lora["trained"], V)
    left = of_lora["without two"] - W
    assert torch.linalg.matrix_rank(left, atol=1e-4) == 1
    assert torch.allclose(torch.linalg.svdvals(left)[0], torch.linalg.svdvals(change)[2])


def test_the_table_holds_every_run_and_its_rows_describe_their_weights():
    assert not Results("dora_swaps", dora_swaps.KEY, dora_swaps.COLUMNS).missing(dora_swaps.POINTS)
    rows = load_results("dora_swaps").set_index("weight")
    assert (rows.loc["base", "turned"] == 0).all() and (rows.loc["base", "length"] == 1).all()
    assert (rows.loc["lengths", "turned"] < 0.01).all()
    assert (rows.loc["directions", "length"] == 1).all()
    trained = rows.loc["trained"]
    for run in trained.itertuples():
        assert abs(int(run.right, 16).bit_count() / run.sentences - run.test) < 1e-5
    one = rows[(rows["method"] == "lora") & (rows["lr"] == 0.01) & (rows["seed"] == 0)]
    net = (one["gained"] - one["lost"]) / one["sentences"]
    assert ((one["test"] - one.loc["trained", "test"] - net).abs() < 2e-5).all()
