"""The study of merging and rounding: what its measures say of known changes, and a whole table."""

import sys
from collections import Counter

import pytest
import torch

from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import merge_study
from common import Results

sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def weight():
    """A weight that lies on Q4_1's grid."""
    torch.manual_seed(0)
    return merge_study.rounded(torch.randn(16, 128), "Q4_1")


def kept(weight, change, kind, adapter="merged"):
    _, found = merge_study.moved({"": (None, weight)}, {"": change}, kind, adapter)
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_1", "Q4_0", "NF4"])
def test_a_rounded_weight_is_on_its_grid(weight, kind):
    once = merge_study.rounded(weight, kind)
    assert torch.allclose(once, merge_study.rounded(once, kind), atol=2e-3)


def test_a_small_change_is_lost_on_the_own_grid_but_for_the_ends_of_each_block(weight):
    change = 0.01 * torch.randn(16, 128)
    lost = kept(weight, change, "Q4_1")
    assert lost["share"] < 0.12 and lost["share"] == pytest.approx(lost["ends"], abs=0.02)
    for cure in merge_study.CURES:
        assert kept(weight, change, cure)["share"] == pytest.approx(1, abs=0.5)
    assert kept(weight, change, "F32") == pytest.approx(lost | {"share": 1, "ends": 0, "noise": 0})
    assert kept(weight, change, "Q4_1", "beside")["share"] == pytest.approx(1, abs=1e-3)


def test_a_change_that_is_equal_within_each_block_is_kept_by_the_offsets(weight):
    change = merge_study.InBlocks()(0.01 * torch.randn(16, 128))
    assert kept(weight, change, "Q4_1")["share"] == pytest.approx(1, abs=0.1)


def test_the_stored_table_has_each_export_of_each_point():
    results = Results("merge_study", merge_study.KEY, merge_study.COLUMNS)
    names = ("scale", "export", "adapter")
    stored = Counter(tuple(row[k] for k in (*merge_study.KEY, *names)) for row in results.rows())
    wanted = Counter(
        tuple(map(str, (*point, *export)))
        for point in merge_study.points()
        for export in merge_study.exports_of(*point)
    )
    assert stored == wanted


def test_in_the_stored_table_only_a_large_change_survives_on_the_own_grid():
    for row in Results("merge_study", merge_study.KEY, merge_study.COLUMNS).rows():
        published = "Q4_1" if row["task"] != "austen" else "none"
        grid = published if row["base"] == "own" else row["base"]
        if (row["export"], row["adapter"]) == (grid, "merged") and row["change"] != "in blocks":
            share, size = float(row["share"]), float(row["half_steps"])
            assert share < 0.1 if size < 0.2 else share > 0.2
