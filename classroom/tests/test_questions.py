"""The questions for an oral exam: four a lesson, with numbers that its run or its lesson shows."""

import re
from pathlib import Path

import pytest
from PIL import Image

from classroom import questions, release
from tools import notebooks, site
from tools.environment import ROOT

PAGE = ROOT / "docs" / "questions.md"
PARTS = re.split(r"(?m)^## (\d\d) .*$", PAGE.read_text(encoding="utf-8"))
SECTIONS = dict(zip(PARTS[1::2], PARTS[2::2], strict=True))
# What is a name and no number: a lesson, a section, an exercise, the label of a question, a file.
NAMED = r"(?i)\b(?:lessons?|sections?|exercises?) \d[\d.]*(?:(?:,| and| to) \d[\d.]*)*"
NAMED += r"|^\*\*\d( · figure)?\.\*\*|\]\(\S+\)|`[^`]*`"
NUMBER = r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)"


def flat(value):
    """Return all numbers of a run, those among its names too."""
    if isinstance(value, dict):
        names = [float(n) for name in value for n in re.findall(NUMBER, name)]
        return names + [n for one in value.values() for n in flat(one)]
    if isinstance(value, list):
        return [n for one in value for n in flat(one)]
    return [] if isinstance(value, str) else [value]


def as_printed(number, text):
    """Return whether a text states a number, rounded to the decimals that the text has."""
    decimals = len(text.partition(".")[2])
    return abs(abs(number) - float(text.replace(",", ""))) <= 0.5001 * 10**-decimals


def lesson_text(number):
    """Return all that a lesson says: its cells and what their stored outputs say in words."""
    cells = notebooks.read(questions.LESSONS[number]).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    shown = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs]
    return "\n".join([*(cell.source for cell in cells), *shown])


def test_every_lesson_has_its_section_in_order():
    assert [*SECTIONS] == [*questions.LESSONS] == [*questions.stored()]


@pytest.mark.parametrize("number", SECTIONS)
def test_a_lesson_has_four_questions_with_answers_and_two_have_a_figure(number):
    section = SECTIONS[number]
    assert re.findall(r"(?m)^\*\*(\d)( · figure)?\.\*\* .*\?$", section) == [
        ("1", " · figure"), ("2", " · figure"), ("3", ""), ("4", "")
    ]  # fmt: skip
    answers = re.findall(r"(?s)<summary>Answer</summary>\n\n(.*?)\n\n(.*?)\n\n</details>", section)
    assert len(answers) == 4
    for answer, wrong in answers:
        assert len(re.findall(r"[.?!](?=\s|$)", answer)) <= 5, answer
        assert wrong.startswith("**A wrong answer shows** ")


@pytest.mark.parametrize("number", SECTIONS)
def test_its_figure_is_small_and_has_an_alternative_text(number):
    ((alt, name),) = re.findall(r"!\[(.*?)\]\((\S+)\)", SECTIONS[number])
    assert len(alt) > 80 and name == f"questions/{number}.png"
    path = PAGE.parent / name
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width <= 800
    assert path.stat().st_size <= 20_000


@pytest.mark.parametrize("number", SECTIONS)
def test_its_numbers_are_those_of_its_run_or_of_its_lesson(number):
    run = flat(questions.stored()[number])
    said = set(re.findall(NUMBER, lesson_text(number)))
    stated = re.findall(NUMBER, re.sub(NAMED, "", SECTIONS[number], flags=re.M))
    unknown = [n for n in stated if n not in said and not any(as_printed(r, n) for r in run)]
    assert not unknown


@pytest.mark.parametrize("number", ["03", "12"])  # two that take a second
def test_a_run_gives_the_numbers_that_are_stored(number):
    made = questions.plain(questions.make(number).numbers)
    stored = questions.stored()[number]
    assert made.keys() == stored.keys()
    assert flat(made) == pytest.approx(flat(stored), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("number", SECTIONS)
def test_the_names_that_a_run_takes_from_its_lesson_are_there(number):
    path = questions.LESSONS[number]
    module = Path(questions.__file__).with_name(f"{notebooks.MODULES[path.stem]}.py")
    taken = re.findall(r"from_lesson\((.*?)\)", module.read_text(encoding="utf-8"))
    named = {name for call in taken for name in re.findall(r'"(\w+)"', call)} - {number}
    cells = notebooks.code_cells(notebooks.read(path))
    assert named <= set().union(*map(questions.bound, cells))


def test_neither_the_students_nor_the_site_have_them():
    assert not {"docs", "docs/questions.md", "classroom"} & set(release.COPIED)
    assert not any("questions" in page for page in (*site.GUIDES, *site.LINKED))
