"""Tables of results, stored tables, and the machine's verdict."""

import re

import pytest
import torch

from peft_lessons import (
    against_peft,
    beside,
    by_rate,
    check_environment,
    compare,
    cost_table,
    load_results,
    measure,
    measured_on,
    references,
    scores,
    spread,
    stored_costs,
    table,
    tuned,
)
from peft_lessons.data import environment as machine_module

ROWS = [{"way": "LoRA", "n": 74498, "time": 0.12345}, {"way": "a <b>", "n": 3, "time": None}]


def test_a_table_is_aligned_text_and_escaped_html():
    shown = table(ROWS, {"time": "{:.1f} s"}, note="one thread")
    assert repr(shown).splitlines() == [
        "way         n   time",
        "LoRA   74,498  0.1 s",
        "a <b>       3",
        "one thread",
    ]
    page = shown._repr_html_()
    assert "a &lt;b&gt;" in page and '<td style="text-align:right">74,498</td>' in page
    assert "0.123" in repr(table(ROWS))


@pytest.mark.parametrize(
    "rows, formats, message",
    [
        ([], {}, "no rows"),
        ([{"a": 1}, {"b": 1}], {}, "the first has"),
        ([{"a": 1}], {"c": "{}"}, "names 'c'"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(rows, formats, message):
    with pytest.raises(ValueError, match=message):
        table(rows, formats)


@pytest.fixture
def results(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "runs.csv").write_text(
        "method,lr,seed,validation,test\n"
        "lora,0.001,0,0.5,0.50\nlora,0.001,1,0.7,0.52\nlora,0.01,0,0.9,0.40\nlora,0.01,1,0.8,0.44\n"
        "full,0.001,0,0.6,0.6\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PEFT_LESSONS_DATA", str(tmp_path))


def test_results_are_read_filtered_and_summed_up(results):
    rows = load_results("runs", method="lora")
    assert rows[0] == dict(method="lora", lr=0.001, seed=0, validation=0.5, test=0.5)
    assert len(rows) == 4 and len(load_results("runs")) == 5
    lr, chosen = tuned(rows)  # by validation, though test says else
    assert lr == 0.01 and [r["seed"] for r in chosen] == [0, 1]
    s = spread(chosen, "test", 100)
    assert (s.mean, s.low, s.high, s.n) == pytest.approx((42, 40, 44, 2))
    assert repr(s) == "42.0 (40.0 to 44.0, 2 seeds)"


def test_results_that_are_not_there_are_refused(results):
    with pytest.raises(FileNotFoundError, match="there are: runs"):
        load_results("nope")
    with pytest.raises(ValueError, match="no column 'rank'"):
        load_results("runs", rank=8)
    with pytest.raises(ValueError, match="matches nothing"):
        spread([], "test")
    with pytest.raises(ValueError, match="seed 0 is there twice"):
        spread(load_results("runs", method="lora"), "test")


def test_this_machine_is_ready_and_says_so():
    found = check_environment()
    assert found.ready, repr(found)
    # The wheel's own version: torch adds +cpu or +cu130 to it only where the index has it, too.
    assert machine_module.metadata.version("torch") in repr(found)
    assert "checksums right" in repr(found)
    assert "This machine is ready." in found._repr_html_()


def test_a_wrong_version_and_a_damaged_file_are_named(monkeypatch):
    real = machine_module.metadata.version
    monkeypatch.setattr(
        machine_module.metadata, "version", lambda n: "1.0" if n == "torch" else real(n)
    )
    broken = machine_module.bundled_files()[0]
    object.__setattr__(broken, "intact", False)
    monkeypatch.setattr(machine_module, "bundled_files", lambda: [broken])
    found = check_environment()
    assert not found.ready and found.verdict.startswith("Not ready")
    assert "✗ torch" in repr(found) and "1.0, needs" in repr(found)
    assert f"missing or damaged: {broken.path}" in repr(found)


def test_every_dependency_is_looked_at():
    text = repr(check_environment())
    for name in ("torch", "transformers", "peft", "jupyterlab", "ipywidgets", "Python", "memory"):
        assert name in text
    assert measure.parameters(torch.nn.Linear(3, 2)).total == 8


def test_tuned_takes_the_rate_by_validation_of_the_first_seed():
    runs = [(0.1, 0, 0.8), (0.1, 1, 0.1), (0.3, 0, 0.7), (0.3, 1, 0.9), (0.01, 0, 0.8)]
    rows = [{"lr": lr, "seed": seed, "validation": value} for lr, seed, value in runs]
    assert tuned(rows[:4]) == (0.1, rows[:2])
    assert tuned(rows[:4], min) == (0.3, rows[2:4])
    assert tuned(rows)[0] == 0.01, "of equals the smaller rate"
    with pytest.raises(ValueError, match="no run with seed 0"):
        tuned(rows[1:2])


STAMP = {"machine": "one core", "torch": "2", "date": "2026-01-01"}
RUNS = [  # (rate, seed, validation, test)
    (0.1, 0, 0.8, 0.85),
    (0.1, 1, 0.7, 0.83),
    (0.01, 0, 0.6, 0.9),
]
ROWS_OF_A_STUDY = [
    dict(lr=lr, seed=seed, validation=v, test=t, trainable=1234, **STAMP) for lr, seed, v, t in RUNS
]


def test_a_comparison_shows_each_way_at_its_tuned_rate():
    ways = {"mine": ROWS_OF_A_STUDY, "base": [ROWS_OF_A_STUDY[2] | {"lr": 0}]}
    shown = repr(compare("sentiment", ways, {"seeds": len}))
    assert shown.splitlines()[0].split("  ")[0] == "minilm, movie sentiment, 200 steps"
    assert "84.0 (83.0 to 85.0, 2 seeds)" in shown and "1,234   0.1" in shown
    assert shown.splitlines()[2].split() == ["base", "1,234", "1", "90.0"]
    assert shown.splitlines()[-1] == measured_on(STAMP) == "one core · torch 2 · 2026-01-01"
    assert scores("austen", ways)["mine"].mean == 0.9, "of perplexities the lower one"
    with pytest.raises(ValueError, match="'sentiment', 'austen'"):
        compare("french", ways)


def test_a_note_says_the_first_and_the_last_day_of_all_rows_shown():
    late, early = STAMP | {"date": "2026-11-24"}, STAMP | {"date": "2025-12-31"}
    assert measured_on(STAMP, late, early) == "one core · torch 2 · 2025-12-31 to 2026-11-24"
    assert measured_on(early, early) == "one core · torch 2 · 2025-12-31"
    other = measured_on(STAMP, STAMP | {"machine": "two cores", "torch": "3"})
    assert other == "one core, two cores · torch 2, 3 · 2026-01-01"
    with pytest.raises(ValueError, match="no rows"):
        measured_on()
    # The row at the other rate is not shown, so its day does not count.
    mine = [ROWS_OF_A_STUDY[0] | late, ROWS_OF_A_STUDY[1], ROWS_OF_A_STUDY[2] | early]
    note = repr(compare("sentiment", {"mine": mine, "last": ROWS_OF_A_STUDY})).splitlines()[-1]
    assert note == "one core · torch 2 · 2026-01-01 to 2026-11-24"


def test_a_note_below_costs_is_of_all_rows_too(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    names = "trainable,peak_bytes,seconds,file_bytes,answer_1,answer_32"
    lines = [f"base,whose,method,{names},torch,machine,date"] + [
        f"minilm,{whose},{method},1,2,0.5,4,0.1,0.2,2.1.0,one core,2026-01-0{day}"
        for whose, method, day in (("ours", "a", 2), ("PEFT", "a", 3), ("ours", "b", 1))
    ]
    (tmp_path / "results" / "costs.csv").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setenv("PEFT_LESSONS_DATA", str(tmp_path))
    both = repr(stored_costs("minilm", {"b": "B", "a": "A"})).splitlines()[-1]
    assert both == "one core · torch 2.1.0 · 2026-01-01 to 2026-01-02"
    assert repr(stored_costs("minilm", {"b": "B"})).endswith("torch 2.1.0 · 2026-01-01")
    assert repr(against_peft("minilm", {"a": "A"})).endswith("2026-01-02 to 2026-01-03")


def test_every_rate_that_was_tried_is_shown_with_its_choice():
    other = [r | {"lr": 1.0} for r in ROWS_OF_A_STUDY[:1]]
    lines = repr(by_rate("sentiment", {"mine": ROWS_OF_A_STUDY, "other": other})).splitlines()
    assert re.findall(r"rate \S+", lines[0]) == ["rate 0.01", "rate 0.1", "rate 1"]
    assert lines[1].split()[1:] == ["60.0", "/", "90.0", "80.0", "/", "85.0"]
    assert lines[2].split()[1:] == ["80.0", "/", "85.0"]
    assert lines[3] == "accuracy, %: validation split / test split"


@pytest.mark.parametrize("task, count", [("sentiment", 4), ("austen", 3)])
def test_what_all_methods_are_laid_beside_is_there_at_three_seeds(task, count):
    ways = references(task)
    assert len(ways) == count and list(ways)[-1] == "full fine-tuning"
    found = scores(task, ways)
    assert all(s.n == 3 for name, s in found.items() if not name.startswith("base"))
    with pytest.raises(ValueError, match="must be one of"):
        references("french")


@pytest.mark.parametrize("task", ["sentiment", "austen"])
def test_own_rows_stand_behind_the_least_and_before_the_others(task):
    least, *others = references(task)
    mine = {"mine": ROWS_OF_A_STUDY, "my other": []}
    ways = beside(task, mine)
    assert list(ways) == [least, *mine, *others]
    assert ways == references(task) | mine
    assert list(beside(task, {})) == [least, *others]
    with pytest.raises(ValueError, match="must be one of"):
        beside("french", mine)


def test_stored_costs_of_the_named_methods():
    text = repr(stored_costs("minilm", {"lora": "LoRA, rank 8, query and value"}))
    assert "on minilm" in text and "74,498" in text and "MiB" in text and "32 texts" in text
    assert "32 texts" not in repr(stored_costs("tinylm", {"full": "full"}, answers=False))
    merged = repr(stored_costs("minilm", {"lora, merged": "merged"})).splitlines()[1]
    assert "MiB" not in merged and merged.count(" ms") == 2
    with pytest.raises(ValueError, match="no row 'bitfit' for tinylm, ours; it has full"):
        stored_costs("tinylm", {"bitfit": "BitFit"})


def test_ours_against_pefts():
    lines = repr(against_peft("minilm", {"lora": "LoRA", "ia3": "(IA)³"})).splitlines()
    assert lines[0].split("  ")[0] == "a step on minilm" and "PEFT's" in lines[0]
    ours, theirs = (float(n) for n in re.findall(r"(\d+) ms", lines[1]))
    assert float(lines[1].split()[-2]) == pytest.approx(ours / theirs, abs=0.02)
    assert lines[3].startswith("a ratio below 1: ours is faster or smaller · x86_64 CPU, 1 thread")
    with pytest.raises(ValueError, match="no row 'pfeiffer' for minilm, PEFT; it has lora"):
        against_peft("minilm", {"pfeiffer": "no adapter of PEFT's"})


def test_a_cost_table_knows_its_units():
    text = repr(cost_table([{"": "a", "file": 1.0, "time of a step": 2.0, "own": 0.5}]))
    assert "1.00 MiB" in text and "2 ms" in text and "0.5" in text
    with pytest.raises(ValueError, match="no rows"):
        cost_table([])
