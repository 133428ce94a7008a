"""The study of how many entries train: its masks, and a table that is complete."""

import sys

import pytest
import torch
from tiny import batch_of, tiny_llama

from peft_lessons.studies import load_results
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import entries_study
from common import Results

sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("arm", ["random", "largest", "smallest"])
def test_a_mask_trains_as_many_entries_as_it_says_and_no_other(arm):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    entries_study.only(model, arm, 40, draw=1, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch_of("llama")).loss.backward()
    optimizer.param_groups[0]["weight_decay"] = 0
    optimizer.step()
    changed = {name: p != before[name] for name, p in model.named_parameters()}
    assert sum(c.sum().item() for c in changed.values()) == 40
    assert all("_proj.weight" in name for name, c in changed.items() if c.any())
    if arm != "random":
        kept = torch.cat([before[name][c].abs() for name, c in changed.items()])
        left = torch.cat([before[n][~c].abs() for n, c in changed.items() if "_proj" in n])
        assert (kept.min() >= left.max()) if arm == "largest" else (kept.max() <= left.min())


def test_shared_out_entries_are_the_best_of_each_matrix_and_of_each_row():
    torch.manual_seed(0)
    merits = [torch.rand(4, 10), torch.rand(8, 10)]
    for by_rows in (False, True):
        kept = entries_study.shares(merits, 12, by_rows)
        inside = [kept[kept < 40], kept[kept >= 40] - 40]
        assert [len(each) for each in inside] == [4, 8]
        for merit, each in zip(merits, inside, strict=True):
            best = merit.argmax(dim=1) + 10 * torch.arange(len(merit))
            expected = best if by_rows else merit.flatten().topk(len(each)).indices
            assert set(each.tolist()) == set(expected.tolist())


def test_the_stored_table_is_complete_and_its_rates_lie_inside_those_that_were_tried():
    results = Results("entries_study", entries_study.KEY, entries_study.COLUMNS)
    assert not results.missing(entries_study.points(results))
    runs = load_results("entries_study")
    tried = runs[(runs["draw"] == 0) & (runs["seed"] == 0)]
    for setting in entries_study.MIDDLE | entries_study.ONCE:
        rates = tried[(tried["arm"] == setting[0]) & (tried["size"] == setting[1])].set_index("lr")
        assert min(rates.index) < rates["validation"].idxmin() < max(rates.index), setting
