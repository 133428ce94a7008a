"""The studies of serving: their mistakes are made, and their tables are complete."""

import sys

import numpy as np

from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import serving_study

sys.path.remove(str(ROOT / "benchmarks"))


def test_inside_a_mistake_the_rows_of_queries_keep_their_order():
    from peft_lessons.deploy import export

    rows = np.arange(8.0).reshape(8, 1)
    with serving_study.unpermuted():
        assert (export._side_by_side(rows, 2) == rows).all()
    assert (export._side_by_side(rows, 2) != rows).any()


def test_all_held_out_messages_begin_alike_and_none_is_learned():
    learned = {serving_study.text_of(row) for row in serving_study.examples("desk", "train")}
    held_out = [serving_study.text_of(row) for row in serving_study.examples("desk", "test")]
    assert len({text.splitlines()[0] for text in held_out}) == 1
    assert not learned & set(held_out)
