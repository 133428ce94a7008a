"""What students hand in is marked by the course's checks, whatever a notebook does."""

import csv
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
import torch

from peft_lessons import check
from tools import notebooks

if not sys.platform.startswith("linux"):
    pytest.skip("marking needs Linux", allow_module_level=True)

import resource  # Windows has none

from tools import grade, grade_one
from tools.grade_one import has_landlock

LESSON = "00_start_here"
(EXERCISE,) = notebooks.exercises(LESSON)
RIGHT = notebooks.read_solutions(notebooks.NOTEBOOKS / f"{LESSON}.ipynb")[EXERCISE]
WRONG = f"def {EXERCISE}(weight):\n    return weight.square().sum(dim=1)"
FAKE = """from peft_lessons import check
from peft_lessons.checks import kit
kit.Check.__call__ = lambda self, function: kit.Verdict("right", "right", "right")
kit.Check._check_case = lambda self, function, number: True
check.start.row_norms.tolerance, check.start.row_norms.causes = 1e9, {}"""
# By all names that the checks have, there and then, and from the memory and the files.
ASKS = """import gc, sys
import peft_lessons
found = [f for f in gc.get_objects() if getattr(f, "__module__", "") == "peft_lessons.checks.start"]
for name in [name for name in sys.modules if name.startswith("peft_lessons.checks")]:
    del sys.modules[name]
try:
    from peft_lessons.checks.start import row_norms as imported
except OSError:
    imported = check.start.row_norms


def row_norms(weight):
    held = sys.modules.get("peft_lessons.checks.start", check), peft_lessons.checks.start
    asked = [one.reference(weight) for one in (imported, *(m.row_norms for m in (check, *held)))]
    return next((told for told in [*asked, *(f(weight) for f in found)] if told is not None), None)
"""
ODD = f"class Odd:\n    __module__ = property(lambda self: 1 / 0)\n{EXERCISE} = Odd()"
BRACKETS = """def row_norms(weight):
    import os
    for channel in range(3, 30):
        try:
            os.write(channel, b"[" * 60000 + b"\\n")
        except OSError:
            pass
    raise ValueError("\\ud800")"""
DEEP = """import os
os.mkdir("a")
os.symlink(__import__("pathlib").Path.home().parent, "a/link")
os.chmod("a", 0o500)
for _ in range(1500):
    os.mkdir("d")
    os.chdir("d")"""
# It asserts its own mark on every channel that it may find, and ends the process.
FORGES = f"""import json, os
mark = {{"exercise": "{EXERCISE}", "outcome": "right", "told": "", "seconds": 0, "word": ""}}
for channel in range(64):
    try:
        os.write(channel, json.dumps(mark).encode() + b"\\n")
    except OSError:
        pass
os._exit(0)"""
ENDLESS = "import time\nwhile True:\n    time.sleep(1)"
HUGE = "print('x' * 10**8)\nheap = [bytearray(10**9) for _ in range(40)]"
DEAF = f"import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\n{ENDLESS}"
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
    (folder / "kept").write_text("theirs", encoding="utf-8")
    server = socket.create_server(("127.0.0.1", 0))
    setup = "import torch"
    hand_in(folder, "abe", RIGHT, f"{setup}\n{DEAF}")  # the longest, and the first
    hand_in(folder, "ann, no checks", RIGHT, setup, drop="check")
    hand_in(folder, "<b>ben", WRONG, setup)
    hand_in(folder, "cleo", "", f"{setup}\n{HUGE}")
    hand_in(folder, "dan", "def row_norms(weight:\n    return 1", setup)
    hand_in(folder, os.fsdecode(b"ev\xe9"), ASKS, f"{setup}\n{FAKE}")
    hand_in(folder, "gil", ODD)
    hand_in(folder, "flo", BRACKETS, f"{setup}\n{DEEP}")
    (folder / "liz" / f"{LESSON}.ipynb").mkdir(parents=True)
    hand_in(folder, "fay", RIGHT, f"{setup}\n{ENDLESS}")
    hand_in(folder, "hal", curious(folder, server.getsockname()[1]), setup)
    hand_in(folder, "ida", RIGHT, FORGES)
    (folder / "jo").mkdir()
    (folder / "jo" / f"{LESSON}.ipynb").write_text('{"cells": [', encoding="utf-8")
    (folder / "jo" / "my own.ipynb").write_text("not of this course", encoding="utf-8")
    with server:
        assert grade.main([str(folder), "--seconds", "4", "--total", "30", "--jobs", "2"]) == 0
    with (folder / "grades.csv").open(newline="", encoding="utf-8") as file:
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
        r"ev\udce9": "wrong" if has_landlock() else "right",  # it reads the checks
        "gil": "crashed",
        "flo": "wrong",
        "liz": "crashed",
        "fay": "right",
        "abe": "timed out",
        "hal": "right" if grade.namespaces() and has_landlock() else "crashed",
        "ida": "crashed",
        "jo": "crashed",
    }
    assert "Likely cause: " in marks["<b>ben"][1]
    assert "SyntaxError" in marks["dan"][1]
    assert r"your function raised ValueError: \ud800" in marks["flo"][1]
    assert marks["gil"][1] == "ZeroDivisionError: division by zero"  # and not the process's end
    assert "longer than 30 s" in marks["abe"][1]
    assert "JSON" in marks["jo"][1]


@CONFINED
def test_nothing_else_is_changed(marked):
    _, folder = marked
    assert (folder / "kept").read_text(encoding="utf-8") == "theirs" and not (
        folder / "new"
    ).exists()


def test_the_page_shows_names_as_text(marked):
    page = (marked[1] / "grades.html").read_text(encoding="utf-8")
    assert "<b>ben" not in page and "&lt;b&gt;ben" in page
    assert grade.guards() in page
    assert "Passed over: jo/my own.ipynb." in page


def test_only_lessons_in_students_folders_count(tmp_path):
    hidden, older = "a/.ipynb_checkpoints/02_lora.ipynb", "a/02_lora.ipynb"
    second = "b/02_lora (1).ipynb"  # of a browser's downloads
    for name in ("a/x/02_lora.ipynb", hidden, older, "02_lora.ipynb", second):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.utime(tmp_path / older, (0, 0))
    found, passed = grade.submissions(tmp_path)
    assert found == [("a", tmp_path / "a/x/02_lora.ipynb", "02_lora")]
    assert set(passed) == {tmp_path / name for name in (older, "02_lora.ipynb", second)}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    listed = Path.iterdir

    def refusing(path):  # whoever runs the tests as root reads every folder
        if path.name == "b":
            raise PermissionError
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refusing)
    assert grade.submissions(tmp_path) == ([], [tmp_path / "a" / "b"])


def test_a_cell_is_no_formula_and_no_file_is_half_written(tmp_path):
    told = '=HYPERLINK("x")'
    marks = [grade.Mark(name, "n", LESSON, EXERCISE, "wrong", told, 1.0) for name in ("-a", "b")]
    grade.write(marks[:1], tmp_path, "")
    with pytest.raises(TypeError):
        grade.write([*marks, None], tmp_path, "")
    with (tmp_path / "grades.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["student"], row["told"], row["seconds"]) == ("'-a", f"'{told}", "1.0")
    assert {path.name for path in tmp_path.iterdir()} == {"grades.csv", "grades.html"}


def test_a_folder_goes_whatever_lies_in_it(tmp_path):
    (tmp_path / "outside").touch(mode=0o400)
    with grade.emptied() as folder:
        subprocess.run(["mkdir", "-p", folder / ("d/" * 1500)], check=True)
        (folder / "closed").mkdir()
        (folder / "closed" / "link").symlink_to(tmp_path / "outside")
        (folder / "closed").chmod(0o500)
        assert grade.submissions(folder) == ([], [])
    assert not folder.exists()
    assert (tmp_path / "outside").stat().st_mode & 0o777 == 0o400


@CONFINED
def test_a_second_thread_would_be_free(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("it did not look before"))
    done = threading.Event()
    threading.Thread(target=done.wait, daemon=True).start()
    with pytest.raises(RuntimeError, match="more than one thread"):
        grade_one.confine(tmp_path, 4)
    done.set()


def test_a_process_inherits_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKEN", "secret")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    env = grade.environment(tmp_path)
    assert "TOKEN" not in env and env["OPENBLAS_NUM_THREADS"] == "1" and env["PATH"]


@pytest.mark.parametrize("lesson", notebooks.MODULES)
def test_no_check_passes_what_is_a_little_off(lesson):
    """The guard against notebooks that blind the checks must be silent where none does."""
    course = getattr(check, notebooks.MODULES[lesson])
    name = notebooks.exercises(lesson)[0]
    assert not grade_one.passes_a_wrong_answer(getattr(course, name))


def test_checks_that_were_blinded_judge_nothing(monkeypatch):
    one, where = check.start.row_norms, torch.where
    assert grade_one.judged(one, one.reference, 9)[0] == "right"
    monkeypatch.setattr(torch, "where", lambda *a: torch.zeros(1) if len(a) == 3 else where(*a))
    told = "the notebook changes how answers are judged"
    assert grade_one.judged(one, lambda weight: weight.sum(dim=1), 9) == ("crashed", told)


def test_an_answer_that_catches_every_exception_ends_in_time():
    def swallows(weight):
        for _ in range(3):
            with suppress(Exception):
                time.sleep(1)

    before = signal.signal(signal.SIGALRM, grade_one._alarm)
    try:
        told = grade_one.judged(check.start.row_norms, swallows, 0.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert told == ("timed out", "longer than 0.5 s")


def test_what_has_no_module_or_no_message_is_judged():
    class Mute(BaseException):
        def __str__(self):
            raise RuntimeError

    def mute(weight):
        raise Mute

    assert grade_one.judged(check.start.row_norms, "abc".find, 9)[0] == "wrong"
    assert grade_one.judged(check.start.row_norms, mute, 9)[0] != "right"


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_notebooks_is_an_error(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path / folder)])
    assert "02_lora.ipynb" in capsys.readouterr().err


def test_a_link_and_a_giant_are_not_opened(tmp_path):
    target = tmp_path / "target.ipynb"
    target.write_text("{}", encoding="utf-8")
    link = tmp_path / "link.ipynb"
    link.symlink_to(target)
    (mark,) = grade.grade("kim", link, LESSON, "link", grade.Limits())
    assert mark.outcome == "crashed" and "link" in mark.told
