"""Every lesson keeps the rules and runs with its solutions."""

import base64
import re
import subprocess
import sys

import pytest
from nbconvert import LatexExporter, MarkdownExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output

from peft_lessons.studies.figures import figure, still
from tools import notebooks
from tools.environment import ROOT
from tools.rules import RULES

LESSONS = notebooks.lessons()
# The bytes and the alternative text of a picture in a page.
PICTURE = re.compile(r'<img src="data:image/png;base64,(\S+)"[^>]* alt="([^"]+)"')


def test_there_are_lessons():
    assert LESSONS
    assert {path.stem for path in LESSONS} <= notebooks.MODULES.keys()


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_rules(path):
    nb = notebooks.read(path)
    complaints = [f"{rule.__name__}: {text}" for rule in RULES for text in rule(nb, path)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_ruff_finds_nothing_unsafe():
    """The part of `make lint` that is about what a notebook must not do, without exceptions."""
    ruff = [sys.executable, "-m", "ruff", "check", "--ignore-noqa", "--output-format=concise"]
    done = subprocess.run(
        [*ruff, "--select=S301,S310,S605,S606,T100,TID251", *LESSONS],
        cwd=notebooks.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_figure_reaches_markdown(path):
    nb = notebooks.read(path)
    # The text between them would need pandoc, and to colour the code takes longest.
    nb.cells = [cell for cell in notebooks.code_cells(nb) if "<img" in str(cell.outputs)]
    for cell in nb.cells:
        cell.source = ""
    pages = [
        out.data.get("text/html", "") for cell in nb.cells for out in cell.outputs if "data" in out
    ]
    page, _ = MarkdownExporter().from_notebook_node(nb)
    figures = PICTURE.findall("".join(pages))
    assert figures and PICTURE.findall(page) == figures


def test_a_figure_that_was_run_reaches_a_pdf_and_is_stored_once():
    fig, ax = figure()
    ax.plot([1, 2])
    data, metadata = still(fig, "A line that rises from one to two")._repr_mimebundle_()
    run = new_output("display_data", data, metadata=metadata)
    nb = new_notebook(cells=[new_code_cell("show()", outputs=[run])])
    latex, made = LatexExporter().from_notebook_node(nb)
    (name,) = re.findall(r"\\adjustimage.*\{(\S+?)\}", latex)
    assert made["outputs"][name] == base64.b64decode(data["image/png"])
    (stored,) = notebooks.clean(nb, "02_lora").cells[0].outputs
    assert stored.data == {form: data[form] for form in ("text/html", "text/plain")}
    assert data["image/png"] in stored.data["text/html"] and not stored.metadata


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_solved(path, tmp_path):
    """With its solutions all checks of a lesson say right, offline, in a folder not its own."""
    cwd, log = tmp_path / "somewhere else", tmp_path / "network.log"
    cwd.mkdir()
    assert notebooks.run_solved(path, cwd, log) == len(notebooks.exercises(path.stem)) > 0
    assert not log.exists(), "the lesson opened a network connection:\n" + log.read_text(
        encoding="utf-8"
    )
    left = [str(file.relative_to(cwd)) for file in cwd.rglob("*")]
    assert not left, f"the lesson leaves files where it runs; use a temporary folder: {left}"


def test_a_printed_source_is_the_one_that_the_package_has():
    def flat(text):
        return "\n".join(line.strip() for line in text.splitlines())

    package = [flat(p.read_text(encoding="utf-8")) for p in (ROOT / "peft_lessons").rglob("*.py")]
    printed = [
        (path.stem, flat(output.data["text/plain"]))
        for path in LESSONS
        for cell in notebooks.code_cells(notebooks.read(path))
        if "show_source(" in cell.source
        for output in cell.outputs
        if "text/markdown" in output.get("data", {})
    ]
    stale = [lesson for lesson, source in printed if not any(source in file for file in package)]
    assert len(printed) >= 8 and not stale, "run `make outputs` for these lessons"
