"""The runner of the benchmarks: it runs what a table lacks, once, and adds rows that say where."""

import sys

import pytest

from peft_lessons import inject, load_model
from tools.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import catalogue
import common

sys.path.remove(str(ROOT / "benchmarks"))

SETTINGS = {("austen", "lora"): (0.1, 0.3), ("austen", "base"): (0.0,)}
KEY = ("task", "method", *common.RUN)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Return a function that reads the rows of the table; nothing is written to data/."""
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark"])

    def read(*columns):
        table = common.Results("tried", KEY, ("validation",)).rows()
        return [tuple(row[c] for c in columns) for row in table]

    return read


def fill(points, run, **settings):
    common.fill_table("tried", KEY, ("validation",), points, run, **settings)


def by_rate(task, method, lr, seed):
    return {"validation": abs(lr - 0.25), "unnamed": "has no column"}


def test_all_rates_run_with_one_seed_and_the_best_one_with_the_others(rows, capsys):
    fill(common.at_best(SETTINGS), by_rate)
    seen = rows("method", "lr", "seed")
    first, others = seen[:3], seen[3:]
    assert first == [("lora", "0.1", "0"), ("lora", "0.3", "0"), ("base", "0.0", "0")]
    assert others == [("lora", "0.3", "1"), ("lora", "0.3", "2")], "a perplexity: the least is best"
    assert all(machine and date for machine, date in rows("machine", "date"))
    written = (common.FOLDER / "tried.csv").read_text(encoding="utf-8")
    assert written.count("thread") == 1, "a stamp is written where it differs from the row above"
    capsys.readouterr()
    fill(common.at_best(SETTINGS), by_rate)
    assert rows("method", "lr", "seed") == seen and not capsys.readouterr().out
    fill(common.at_best(SETTINGS, max), by_rate)
    assert ("lora", "0.1", "2") in rows("method", "lr", "seed")
    fill([("austen", "base", 0.0, 0)], by_rate, anew=True)
    assert rows("method", "lr", "seed") == [("base", "0.0", "0")]


def test_a_run_that_is_stopped_leaves_no_row_and_is_run_again(rows):
    points, stopped = [("austen", "lora", lr, 0) for lr in (0.1, 0.3)], []

    def run(task, method, lr, seed):
        if lr == 0.3 and not stopped:
            stopped.append(lr)
            raise KeyboardInterrupt
        return [{"validation": number} for number in range(2)]  # two rows a point

    with pytest.raises(KeyboardInterrupt):
        fill(points, run)
    assert rows("lr", "validation") == [("0.1", "0"), ("0.1", "1")]
    fill(points, run)
    assert rows("lr") == [("0.1",), ("0.1",), ("0.3",), ("0.3",)]


def test_a_second_process_helps_from_the_end_and_no_point_has_two_rows(rows, monkeypatch):
    points = [("austen", "lora", lr, 0) for lr in (0.1, 0.2, 0.3)]
    monkeypatch.setattr(sys, "argv", ["benchmark", "--backwards"])
    done = []

    def run(*point):
        done.append(point)
        if point[2] == 0.3:  # meanwhile the other process runs the same point and the first one
            results = common.Results("tried", KEY, ("validation",))
            results.add(point, [{"validation": "other"}])
            results.add(points[0], [{"validation": "other"}])
        return {"validation": "mine"}

    fill(points, run)
    assert [lr for _, _, lr, _ in done] == [0.3, 0.2]
    assert rows("lr", "validation") == [("0.3", "other"), ("0.1", "other"), ("0.2", "mine")]


def test_bits_and_pairs_count_the_right_sentences():
    assert common.hexadecimal([True, False, False, False, True]) == "11"
    counts = common.paired_counts(
        [True, True, False, False, True], [True, False, True, False, False]
    )
    assert counts == {"both": 1, "only_first": 2, "only_second": 1, "neither": 1}


@pytest.mark.parametrize("task", catalogue.BASES)
def test_every_setting_describes_a_method_for_the_base_of_a_task(task):
    for name in catalogue.SETTINGS:
        more = catalogue.schedule(200) if name == "adalora" else {}
        assert catalogue.setting(name, task, **more)
    for name in ("lora", "dora", "norms", "ia3"):  # the names of the layers are the base's
        assert inject(load_model(catalogue.BASES[task]), catalogue.setting(name, task)).trainable
    for name, other in (("lora, all", task), ("lora", "french")):
        with pytest.raises(ValueError, match=r"must be one of .*'(lora|austen)'"):
            catalogue.setting(name, other)
