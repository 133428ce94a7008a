"""The studies of serving: their mistakes are made, and their tables are complete."""

import sys

import numpy as np

from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import release_files
import serving_costs
import serving_study
from common import Results

sys.path.remove(str(ROOT / "benchmarks"))


def stored(study, points: list[tuple], name: str) -> list[dict]:
    """Return the rows of a stored table, which lacks no point."""
    results = Results(name, study.KEY, study.COLUMNS)
    rows = results.rows()
    assert not results.missing(points) and len(rows) == len(points)
    return rows


def test_the_stored_table_of_files_is_complete_and_its_bits_add_up():
    for row in stored(serving_study, serving_study.points(), "serving_study"):
        share = int(row["right"], 16).bit_count() / int(row["sentences"])
        assert row["whole"] == f"{share:.4f}"
        assert (row["perplexity"] != "") == serving_study.reads_prose(int(row["seed"]), row["way"])


def test_the_stored_tables_of_costs_and_of_releases_are_complete():
    stored(serving_costs, serving_costs.POINTS, "serving_costs")
    stored(release_files, [(letter,) for letter in release_files.FILES], "release_files")


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
