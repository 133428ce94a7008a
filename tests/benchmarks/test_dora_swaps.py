"""The swapped lengths and directions of lesson 04: what each weight is made of, and the table."""

import sys

import torch

from peft_lessons.studies import load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import dora_swaps

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


def test_the_rows_of_the_table_describe_their_weights():
    rows = load_results("dora_swaps")
    base = rows[rows["weight"] == "base"]
    assert (base["turned"] == 0).all() and (base["length"] == 1).all()
    moved = rows[rows["weight"].isin(("directions", "undivided"))]
    assert (moved["turned"] > 10).all() and (moved["lost"] >= 0).all()
