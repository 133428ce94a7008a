"""What students hand in is marked by the course's checks, whatever a notebook does."""

import csv
import socket

import nbformat
import pytest

from tools import grade, notebooks
from tools.grade_one import has_landlock

LESSON = "00_start_here"
(EXERCISE,) = notebooks.exercises(LESSON)
RIGHT = notebooks.read_solutions(notebooks.NOTEBOOKS / f"{LESSON}.ipynb")[EXERCISE]
WRONG = f"def {EXERCISE}(weight):\n    return weight.square().sum(dim=1)"
FAKE = """from peft_lessons.checks import kit
kit.Check.__call__ = lambda self, function: kit.Verdict("right", "right", "right")
kit.Check._check_signature = lambda self, function: None
kit.Check._check_case = lambda self, function, number: True"""
ENDLESS = "while True:\n    pass"
HUGE = "print('x' * 10**8)\nheap = [bytearray(10**9) for _ in range(40)]"
DEAF = "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True:\n    pass"
CONFINED = pytest.mark.skipif(
    not (has_landlock() and grade.namespaces()), reason="this kernel has no Landlock or namespaces"
)


def curious(folder, port):
    """An answer that is right only if nothing outside can be read, changed or reached."""
    solutions = notebooks.NOTEBOOKS / "solutions" / "start.py"
    return f"""{RIGHT.replace(f"def {EXERCISE}", "def honest")}


def tried(command):
    import subprocess
    return subprocess.run(["bash", "-c", command], capture_output=True).returncode == 0


def {EXERCISE}(weight):
    assert tried("true") and tried("touch mine")
    assert not tried("echo more >> {folder}/kept") and not tried("rm {folder}/kept")
    assert not tried("touch {folder}/new") and not tried("cat {solutions}")
    assert not tried("exec 3<>/dev/tcp/127.0.0.1/{port}")
    return honest(weight)"""


def hand_in(folder, student, answer="", before="", drop=""):
    """A student's notebook, with an answer in the place of the stub and a cell before it."""
    nb = notebooks.read(notebooks.NOTEBOOKS / f"{LESSON}.ipynb")
    nb.cells = [cell for cell in nb.cells if drop not in notebooks.tags(cell)]
    at = next(i for i, cell in enumerate(nb.cells) if "exercise" in notebooks.tags(cell))
    nb.cells[at].source = answer or nb.cells[at].source
    nb.cells.insert(at, nbformat.v4.new_code_cell(before))
    nb.cells = nb.cells[max(0, at - 3) :]  # the set-up would only take time
    path = folder / student / LESSON / f"{LESSON}.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(nb, path)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """{student: (outcome, told)} of a class with all kinds of notebooks, and its folder."""
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "kept").write_text("theirs")
    server = socket.create_server(("127.0.0.1", 0))
    setup = "import torch"
    hand_in(folder, "abe", RIGHT, f"{setup}\n{DEAF}")  # the longest, and the first
    hand_in(folder, "ann, no checks", RIGHT, setup, drop="check")
    hand_in(folder, "<b>ben", WRONG, setup)
    hand_in(folder, "cleo", "", f"{setup}\n{HUGE}")
    hand_in(folder, "dan", "def row_norms(weight:\n    return 1", setup)
    hand_in(folder, "eve", WRONG, f"{setup}\n{FAKE}")
    hand_in(folder, "fay", RIGHT, f"{setup}\n{ENDLESS}")
    hand_in(folder, "hal", curious(folder, server.getsockname()[1]), setup)
    hand_in(folder, "ida", RIGHT, "import os\nos._exit(0)")
    (folder / "jo").mkdir()
    (folder / "jo" / f"{LESSON}.ipynb").write_text('{"cells": [')
    (folder / "jo" / "my own.ipynb").write_text("not of this course")
    with server:
        assert grade.main([str(folder), "--seconds", "4", "--total", "30", "--jobs", "2"]) == 0
    with (folder / "grades.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all((row["lesson"], row["exercise"]) == (LESSON, EXERCISE) for row in rows)
    return {row["student"]: (row["outcome"], row["told"]) for row in rows}, folder


def test_a_class_is_marked(marked):
    marks, _ = marked
    assert {student: outcome for student, (outcome, _) in marks.items()} == {
        "ann, no checks": "right",
        "<b>ben": "wrong",
        "cleo": "not attempted",
        "dan": "crashed",
        "eve": "crashed",
        "fay": "right",
        "abe": "timed out",
        "hal": "right" if grade.namespaces() and has_landlock() else "crashed",
        "ida": "crashed",
        "jo": "crashed",
    }
    assert "Likely cause: " in marks["<b>ben"][1]
    assert "SyntaxError" in marks["dan"][1]
    assert marks["eve"][1] == "the notebook changes how answers are judged"
    assert "longer than 30 s" in marks["abe"][1]
    assert "JSON" in marks["jo"][1]


@CONFINED
def test_nothing_else_is_changed(marked):
    _, folder = marked
    assert (folder / "kept").read_text() == "theirs" and not (folder / "new").exists()


def test_the_page_shows_names_as_text(marked):
    page = (marked[1] / "grades.html").read_text()
    assert "<b>ben" not in page and "&lt;b&gt;ben" in page
    assert grade.guards() in page


def test_only_lessons_in_students_folders_count(tmp_path):
    hidden = "a/.ipynb_checkpoints/02_lora.ipynb"
    for name in ("a/x/02_lora.ipynb", hidden, "02_lora.ipynb", "b/x.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = grade.submissions(tmp_path)
    assert [(student, lesson) for student, _, lesson in found] == [("a", "02_lora")]


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_notebooks_is_an_error(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path / folder)])
    assert "02_lora.ipynb" in capsys.readouterr().err


def test_a_link_and_a_giant_are_not_opened(tmp_path):
    target = tmp_path / "target.ipynb"
    target.write_text("{}")
    link = tmp_path / "link.ipynb"
    link.symlink_to(target)
    (mark,) = grade.grade("kim", link, LESSON, "link", grade.Limits())
    assert mark.outcome == "crashed" and "link" in mark.told
