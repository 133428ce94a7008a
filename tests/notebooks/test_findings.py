"""Each number of docs/findings.md is printed in the section of the lesson that its line links."""

import re

import pytest

from peft_lessons.costs import evidence
from tools import notebooks
from tools.environment import ROOT

PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
LINE = re.compile(r"- (?P<said>\*\*.+\*\* .+) \*(?P<size>[^*]+)\* · \[(\d\d)\]\((?P<link>[^)]+)\)")
LINES = re.findall(r"(?m)^- .+$", PAGE)
LESSONS = {path.name: notebooks.read(path) for path in notebooks.lessons()}


def numbers(text):
    """Return the numbers of a text as they are written, without signs and thousands' commas."""
    return set(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text)))


def slug(title):
    """Return the anchor that MyST and GitHub give a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def sections(nb):
    """Return {anchor: what the code cells below that heading print}, with subsections and
    exercises."""
    printed, above = {}, []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for marks, title in re.findall(r"(?m)^(#{2,3}) (?!Exercise)(.+)$", cell.source):
                above = [(level, name) for level, name in above if level < len(marks)]
                above.append((len(marks), slug(title)))
                printed[slug(title)] = ""
            continue
        for _, name in above:
            printed[name] += shown(cell)
    return printed


def shown(cell):
    """Return the texts of a code cell's outputs."""
    texts = []
    for output in cell.outputs:
        data = output.get("data", {})
        texts += [output.get("text", ""), data.get("text/plain", ""), data.get("text/markdown", "")]
    return "\n".join(texts)


def complaints(line):
    """Yield what is wrong with a finding: its form, its anchor, or a number that is not printed."""
    found = LINE.fullmatch(line)
    if found is None:
        yield "not of the form: - **belief** outcome *size* · [NN](link)"
        return
    file, _, anchor = found["link"].removeprefix("../notebooks/").partition("#")
    printed = sections(LESSONS[file]) if file in LESSONS and file.startswith(found[3]) else {}
    if anchor not in printed:
        yield f"no section {found['link']}"
    elif missing := numbers(found["said"]) - numbers(printed[anchor]):
        yield f"{sorted(missing)} not printed in {found['link']}"


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[4:40])
def test_a_finding_is_printed_where_it_says(line):
    assert not [*complaints(line)]


def test_every_lesson_has_a_finding():
    assert {found[3] for found in map(LINE.fullmatch, LINES)} == {name[:2] for name in LESSONS}


def test_the_sizes_are_those_of_the_models():
    sizes = (evidence.TINYLM, evidence.MINILM, evidence.SMOLLM2)
    named = re.findall(r"\*\*(\w+)\*\* \((\S+) million", PAGE)
    assert [size for _, size in named] == [f"{1000 * size:.3g}" for size in sizes]
    models = {name for name, _ in named}
    assert all(
        models & set(re.findall(r"\w+", found["size"])) for found in map(LINE.fullmatch, LINES)
    )


def test_a_wrong_finding_is_found():
    line = LINES[0]
    assert [*complaints(line.replace("19 %", "18 %"))] != []
    assert [*complaints(line.replace("#3-", "#4-"))] != []
    assert [*complaints(line.replace("02_lora", "03_qlora"))] != []
    assert [*complaints(line.replace(" · ", " "))] != []
