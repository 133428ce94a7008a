"""Minutes are measured by one rule, and cards, tables and plans state what is measured."""

import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import minutes, notebooks
from tools.environment import ROOT

LESSONS = notebooks.lessons()
WORDS = "word " * 150
TABLE = new_output("display_data", {"text/html": "<table>", "image/png": "aGk="})
LONG, SHORT = (new_output("stream", text="a\n" * lines) for lines in (4, 3))


def code(lines, *outputs, tags=()):
    source = "import math\n\n# a comment\n" + "x\n" * lines
    return new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)})


def lesson(*cells, time="core 10 min"):
    card = f"# Title\n\n| **Question** | |\n|---|---|\n| **Time** | {time}; computes a minute |"
    return new_notebook(cells=[new_markdown_cell(card), *cells])


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (new_markdown_cell(f"## {WORDS}\n\n> **{WORDS}**"), 2),
        (new_markdown_cell("$$a = b$$\n\n$$c\n= d$$"), 1),
        (new_markdown_cell("[one](02_lora.ipynb) <b title='x'>two</b> | three_four |"), 4 / 150),
        (code(15), 1),
        (code(60, tags=["plumbing"]), 1),
        (code(0, TABLE, LONG, SHORT), 1),
    ],
)
def test_the_minutes_of_a_cell(cell, expected):
    assert minutes.reading(cell) == pytest.approx(expected)


def test_the_parts_of_a_lesson_are_told_apart():
    nb = lesson(
        new_markdown_cell("### Exercise 2.1 · One  ★ 5 min\n\n" + WORDS),
        code(15, tags=["exercise"]),
        code(15, tags=["check"]),
        new_markdown_cell(WORDS),  # prose below a check belongs to the core again
        new_markdown_cell("## Deeper · First (2 min)"),
        code(30),
        new_markdown_cell("### Exercise 2.2 · Two  ★★ 15 min\n\n" + WORDS),
        new_markdown_cell("## Deeper · Second\n\n" + WORDS),
        new_markdown_cell("### Part\n\n" + WORDS),
        new_markdown_cell("## Core\n\n" + WORDS),
    )
    parts = minutes.measured(nb)
    assert (parts.exercises, parts.core_exercises) == (20, 5)
    assert parts.core == pytest.approx(2, abs=0.1)
    assert list(parts.sections) == ["Deeper · First (2 min)", "Deeper · Second"]
    assert list(parts.sections.values()) == pytest.approx([2, 2], abs=0.1)
    assert parts.deeper == sum(parts.sections.values())


def test_what_is_a_heading():
    nb = lesson(
        new_markdown_cell("### Exercise 2.1 · One  ★ 5 min \r\n\n" + WORDS),
        new_markdown_cell(
            "## Part\n\n```\n## Exercise 9 · No 90 min\n## Deeper · No\n```\n" + WORDS
        ),
        new_markdown_cell("## Deeper · First (2 min) \r\n\n```sh\n# install\n```"),
        new_markdown_cell("    ```\n    # not closed\n\n" + WORDS),
    )
    parts = minutes.measured(nb)
    assert parts.exercises == 5 and parts.core == pytest.approx(1, abs=0.2)
    assert parts.sections == {"Deeper · First (2 min)": pytest.approx(1, abs=0.1)}


def test_minutes_and_folds_agree_on_what_is_deeper():
    for source in ("Text.\n\n## Deeper · A (1 min)", "### Deeper · A (1 min)", "## Deeper still"):
        nb = lesson(new_markdown_cell(source))
        assert not minutes.measured(nb).sections
        assert notebooks.cell_metadata(nb) == [{}, {}]


SECTION = [new_markdown_cell("## Deeper · Long (10 min)"), code(150)]
EXERCISE = new_markdown_cell("### Exercise 2.1 · One  ★ 5 min")


@pytest.mark.parametrize(
    ("cells", "time", "message"),
    [
        ([code(150)], "core 10 min", None),
        ([code(150)], "core 12 min", None),
        ([code(150)], "core 20 min", "core 20 min, and the rule measures 10"),
        ([code(150)], "10 minutes of reading", "core – min, and the rule measures 10"),
        ([], "core 3 min", None),
        (SECTION, "core 1 min, deeper 10 min", None),
        (SECTION, "core 1 min", "deeper – min, and the rule measures 10"),
        ([], "core 1 min, deeper 5 min", "deeper 5 min, and the rule measures 0"),
        ([EXERCISE], "core 1 min, exercises 5 min", None),
        ([EXERCISE], "core 1 min, exercises 10 min", "exercises 10 min, and their headings add up"),
        (
            [EXERCISE],
            "core 1 min, exercises 5 min (3 of them in the core)",
            "3 min of the exercises are in the core, and the headings there add up to 5",
        ),
        (
            [new_markdown_cell("## Deeper · Short (1 min)"), EXERCISE],
            "core 1 min, exercises 5 min",
            "5 min of the exercises are in the core, and the headings there add up to 0",
        ),
        (
            [new_markdown_cell("## Deeper · Long (4 min)"), code(150)],
            "core 1 min, deeper 10 min",
            "'Deeper · Long (4 min)' is off: the rule measures 10 minutes",
        ),
        (
            [new_markdown_cell("## Deeper · Long")],
            "core 1 min",
            "'Deeper · Long' does not end with its minutes",
        ),
    ],
)
def test_a_statement_that_is_off_is_told(cells, time, message):
    problems = minutes.complaints(lesson(*cells, time=time))
    assert problems == [] if message is None else message in problems[0] and len(problems) == 1


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_card_states_what_is_measured(path):
    assert not minutes.complaints(notebooks.read(path))


def test_the_core_of_a_lesson_is_read_in_one_sitting():
    cores = {path.stem[:2]: minutes.measured(notebooks.read(path)).core for path in LESSONS}
    assert not {number for number, core in cores.items() if core > minutes.SITTING}


def test_the_table_marks_what_is_off(monkeypatch, capsys):
    nb = lesson(code(600), time="core 10 min")
    monkeypatch.setattr(notebooks, "read", lambda path: nb)
    assert minutes.main(["02"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"(?m)^02_lora +40 +10 +0 +– +0 +–  core above 35$", printed)
    assert "! the card says core 10 min" in printed and "cards that are off: 1" in printed


# ------------------------------------------------------------------ tables and plans


def rows(file):
    return [found[2] for found in minutes.ROW.finditer(file.read_text(encoding="utf-8"))]


def test_tables_and_plans_state_the_minutes_of_the_cards():
    stale = [
        str(file.relative_to(ROOT))
        for file, text in minutes.pages().items()
        if file.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run `make minutes ARGS=--write`"
    assert rows(minutes.README) == [path.stem for path in LESSONS]
    assert set(rows(minutes.MAP)) >= {path.stem for path in LESSONS[1:]}


def test_the_sums_of_plans_and_paths(monkeypatch, tmp_path, capsys):
    row = "| [**02 LoRA**](02_lora.ipynb) | question | 1 | | 3 |\n"
    path = "**Half a day** (02): 9 h 9 min. **All** of it takes 1 h.\n"
    plan = (
        "### Half a day: what it is\n\n"
        "| [02](../notebooks/02_lora.ipynb) | core and exercises | 1 |\n"
        "| [02](../notebooks/02_lora.ipynb) | core | 1 |\n"
        "| [02](../notebooks/02_lora.ipynb) | all | 1 |\n"
        "| | **together** | **2** |\n"
    )
    for name, text in (("README", row), ("MAP", row + path.replace(". ", ".\n")), ("PLANS", plan)):
        monkeypatch.setattr(minutes, name, tmp_path / name)
        (tmp_path / name).write_text(text, encoding="utf-8")
    nb = lesson(time="core 30 min, deeper 25 min, exercises 65 min (20 of them in the core)")
    monkeypatch.setattr(notebooks, "read", lambda path: nb)
    monkeypatch.setattr(notebooks, "lessons", lambda selection=None: [LESSONS[2]])
    for file, there, new, message in (
        ("README", "02_lora.ipynb", "99_none.ipynb", "links 99_none.ipynb, and there is no such"),
        ("PLANS", "day:", "day", "PLANS has no heading '### Half a day: …'"),
    ):
        text = (tmp_path / file).read_text("utf-8")
        (tmp_path / file).write_text(text.replace(there, new), encoding="utf-8")
        assert minutes.main(["--write"]) == 1 and message in capsys.readouterr().out
        (tmp_path / file).write_text(text, encoding="utf-8")
    for silent in (lesson(time="an hour"), new_notebook()):
        monkeypatch.setattr(notebooks, "read", lambda path, silent=silent: silent)
        assert minutes.main(["--write"]) == 1
        assert "nothing is written: the card of 02_lora" in capsys.readouterr().out
    assert (tmp_path / "MAP").read_text("utf-8").startswith(row)
    monkeypatch.setattr(notebooks, "read", lambda path: nb)
    minutes.main(["--write"])
    readme, start, plans = ((tmp_path / n).read_text("utf-8") for n in ("README", "MAP", "PLANS"))
    assert readme == "| [**02 LoRA**](02_lora.ipynb) | question | 30 | 25 | 65 |\n"
    assert "**Half a day** (02): 3 h 15 min." in start and "**All** of it takes 2 h." in start
    assert re.findall(r"(\d+)(?:\*\*)? \|\n", plans) == ["50", "30", "120", "200"]
