"""Tables of results, stored tables, and the machine's verdict."""

import pytest
import torch

from peft_lessons import best, load_results, machine_check, measure, spread, table, tuned
from peft_lessons import machine as machine_module

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
        "full,0.001,0,0.6,0.6\n"
    )
    monkeypatch.setenv("PEFT_LESSONS_DATA", str(tmp_path))


def test_results_are_read_filtered_and_summed_up(results):
    rows = load_results("runs", method="lora")
    assert rows[0] == dict(method="lora", lr=0.001, seed=0, validation=0.5, test=0.5)
    assert len(rows) == 4 and len(load_results("runs")) == 5
    lr, chosen = best(rows, over="lr", by="validation")  # by validation, though test says else
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
    with pytest.raises(ValueError, match="matches nothing"):
        best([], over="lr", by="validation")
    with pytest.raises(ValueError, match="seed 0 is there twice"):
        spread(load_results("runs", method="lora"), "test")


def test_this_machine_is_ready_and_says_so():
    found = machine_check()
    assert found.ready, repr(found)
    assert torch.__version__ in repr(found) and "checksums right" in repr(found)
    assert "This machine is ready." in found._repr_html_()


def test_a_wrong_version_and_a_damaged_file_are_named(monkeypatch):
    real = machine_module.metadata.version
    monkeypatch.setattr(
        machine_module.metadata, "version", lambda n: "1.0" if n == "torch" else real(n)
    )
    broken = machine_module.bundled_files()[0]
    object.__setattr__(broken, "intact", False)
    monkeypatch.setattr(machine_module, "bundled_files", lambda: [broken])
    found = machine_check()
    assert not found.ready and found.verdict.startswith("Not ready")
    assert "✗ torch" in repr(found) and "1.0, needs" in repr(found)
    assert f"missing or damaged: {broken.path}" in repr(found)


def test_every_dependency_is_looked_at():
    text = repr(machine_check())
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
