"""What students hand in is marked by the course's checks, whatever a notebook does."""

import csv
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import unicodedata
import zipfile
from datetime import datetime

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

from peft_lessons import check
from tools import grade, grade_one, gradebook, gradescope, notebooks, submissions
from tools.grade_one import has_landlock, own_texts
from tools.gradebook import Mark, Rules
from tools.submissions import Handed, Person

if not sys.platform.startswith("linux"):
    pytest.skip("the scripts and notebooks of these tests are Linux's", allow_module_level=True)

LESSON = "00_start_here"
(EXERCISE,) = notebooks.exercises(LESSON)
RIGHT = notebooks.read_solutions(notebooks.NOTEBOOKS / f"{LESSON}.ipynb")[EXERCISE]
WRONG = f"def {EXERCISE}(weight):\n    return weight.square().sum(dim=1)"
# By all names that the checks have.
FAKE = """from peft_lessons import check, checks
from peft_lessons.checks import kit
from peft_lessons.checks.start import row_norms as known
kit.Check.__call__ = lambda self, function: kit.Verdict("right", "right", "right")
kit.Check._check_case = lambda self, function, number: True
check.start.row_norms.tolerance, checks.start.row_norms.causes = 1e9, {}"""
ASKS = f"""import torch


def {EXERCISE}(weight):
    asked = [f.reference(weight) for f in (known, check.start.row_norms, checks.start.row_norms)]
    return next((told for told in asked if isinstance(told, torch.Tensor)), None)"""
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
    try:
        bytearray(5 * 2**30)
    except MemoryError:
        return honest(weight)"""


# It is right only if the check draws other numbers than in the notebook.
SHOWN = float(getattr(check.start, EXERCISE)._arguments(0)[0].flatten()[0])
OTHER = f"""{RIGHT.replace(f"def {EXERCISE}", "def honest")}


def {EXERCISE}(weight):
    assert abs(weight.flatten()[0] - {SHOWN}) > 1e-6
    return honest(weight)"""


def hand_in(path, answer="", before="", drop="", heading="### Exercise"):
    """A student's notebook: an answer in the place of the stub, before it a heading and a cell."""
    nb = notebooks.read(notebooks.NOTEBOOKS / f"{LESSON}.ipynb")
    nb.cells = [cell for cell in nb.cells if drop not in notebooks.tags(cell)]
    at = next(i for i, cell in enumerate(nb.cells) if "exercise" in notebooks.tags(cell))
    nb.cells[at].source = answer or nb.cells[at].source
    first = nbformat.v4.new_code_cell(before, metadata={"tags": ["plumbing"]})
    nb.cells[at:at] = [nbformat.v4.new_markdown_cell(heading), first]
    nb.cells = nb.cells[max(0, at - 3) :]  # the set-up would only take time
    nb = notebooks.clean(nb, LESSON)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)


ROSTER = """id,name,email
7,"Roe, Ann",ann@example.org
8,"Doe, Gus",gus@example.org
9,"Poe, Max",max@example.org
"""
RULES = f"""late = 25
seed = "secret"
[due]
{LESSON} = 2026-11-01T12:00:00
[points.{LESSON}]
{EXERCISE} = 4
"""
ANN, GUS = f"roeann_LATE_7_123_{LESSON}-1.ipynb", "Gus Doe_55_assignsubmission_file"
EVE = os.fsdecode(b"<b>ev\xe9")


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """The rows of grades.csv of a class by student, and its folder."""
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "kept").write_text("theirs", encoding="utf-8")
    (folder / "roster.csv").write_text(ROSTER, encoding="utf-8")
    (folder / "rules.toml").write_text(RULES, encoding="utf-8")
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    hand_in(folder / ANN, OTHER, "import torch", drop="check")
    hand_in(folder / EVE / f"{LESSON}.ipynb", ASKS, FAKE)
    deeper = "## Deeper · Beyond (3 min)"
    hand_in(folder / GUS / f"{LESSON}.ipynb", RIGHT, "import torch", heading=deeper)
    hand_in(folder / "hal" / LESSON / f"{LESSON}.ipynb", curious(folder, port), "import torch")
    hand_in(folder / "ida" / f"{LESSON}.ipynb", RIGHT, FORGES)
    (folder / "jon").mkdir()
    (folder / "jon" / f"{LESSON}.ipynb").touch()
    (folder / "kim").mkdir()
    (folder / "kim" / f"{LESSON}.ipynb").write_text("{", encoding="utf-8")
    (folder / "liz" / f"{LESSON}.ipynb").mkdir(parents=True)
    (folder / "liz" / "my own.ipynb").write_text("not of this course", encoding="utf-8")
    for path in folder.rglob("*.ipynb"):
        time = datetime(2026, 11, 1, 11).timestamp()
        os.utime(path, (time, time))
    with server:
        assert grade.main(arguments(folder)) == 0
    return read(folder), folder


def arguments(folder):
    return [str(folder), "--roster", f"{folder}/roster.csv", "--rules", f"{folder}/rules.toml"]


def read(folder):
    with (folder / "grades.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all((row["lesson"], row["exercise"]) == (LESSON, EXERCISE) for row in rows)
    return {row["student"]: row for row in rows}


def test_a_class_is_marked(marked):
    confined = grade.namespaces() and has_landlock()
    assert {s: (row["outcome"], row["points"]) for s, row in marked[0].items()} == {
        "7": ("right", "3.0"),  # a day late, by Canvas's mark
        "8": ("right", "4.0"),
        "9": ("not handed in", "0"),
        r"<b>ev\udce9": ("wrong", "0.0"),
        "hal": ("right", "4.0") if confined else ("crashed", "0.0"),
        "ida": ("crashed", "0.0"),
        "jon": ("crashed", "0.0"),
        "kim": ("crashed", "0.0"),
        "liz": ("crashed", "0.0"),
    }
    told = "the file is damaged: hand in a notebook that JupyterLab opens (NotJSONError)"
    assert marked[0]["kim"]["told"] == told
    assert marked[0]["jon"]["told"] == "the notebook is an empty file"


def test_what_is_unchanged_is_not_run_again(marked, monkeypatch):
    rows, folder = marked
    seen, real = [], grade.judge
    monkeypatch.setattr(grade, "judge", lambda path, *a: seen.append(path) or real(path, *a))
    text = (folder / "rules.toml").read_text(encoding="utf-8")
    (folder / "rules.toml").write_text(text.replace("= 4", "= 8"), encoding="utf-8")
    assert grade.main(arguments(folder)) == 0
    (folder / "rules.toml").write_text(text, encoding="utf-8")
    assert seen == [folder / "liz" / f"{LESSON}.ipynb"], "of what is no file nothing is remembered"
    doubled = {student: 2 * float(row["points"]) for student, row in rows.items()}
    assert {student: float(row["points"]) for student, row in read(folder).items()} == doubled
    assert grade.main(arguments(folder)) == 0 and read(folder) == rows
    seen.pop()
    one = Handed("gus", LESSON, folder / GUS / f"{LESSON}.ipynb", False, 0)
    seen.clear()
    monkeypatch.setattr(grade, "judge", lambda path, *a: seen.append(a) or grade.Judged({}, []))
    for student, seed, again in (("8", "secret", True), ("8", "other", False), ("x", "secret", 0)):
        grade.remembered(one, student, folder, grade.Limits(), seed, again)
    assert len({variant for *_, variant in seen}) == 3


def test_a_page_of_feedback_shows_nobody_else(marked):
    rows, folder = marked
    pages = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("feedback/*")}
    assert len(pages) == len(rows)
    assert "Roe, Ann (7)" in pages["7"] and "3 of 4 points" in pages["7"]
    assert "1 day late: 75% of its points count" in pages["7"]
    names = {"7": "Roe, Ann", "8": "Doe, Gus", "9": "Poe, Max"}
    for student, page in pages.items():
        assert [s for s, name in names.items() if name in page] == [student] * (student in names)
        assert "example.org" not in page
    with zipfile.ZipFile(folder / "feedback_moodle.zip") as archive:
        assert archive.namelist() == [f"{GUS}_/feedback.html"]
        assert archive.read(f"{GUS}_/feedback.html").decode() == pages["8"]


def test_the_wide_table_and_the_texts(marked):
    with (marked[1] / "grades_wide.csv").open(newline="", encoding="utf-8") as file:
        head, ann, *_ = csv.reader(file)
    assert head == ["id", "name", "email", f"{LESSON} {EXERCISE}", "total", "maximum"]
    assert ann == ["7", "Roe, Ann", "ann@example.org", "3", "3", "4"]
    with (marked[1] / "texts.csv").open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    assert ["8", LESSON, "## Deeper · Beyond (3 min)"] in [[r[0], r[1], r[3]] for r in rows]


def test_of_a_changed_cell_only_what_the_student_wrote_is_a_text():
    cell = nbformat.v4.new_markdown_cell
    texts = ["# Lesson", "## Summary\n\n1. Why?\n2. When?", "Next"]
    nb = nbformat.v4.new_notebook(cells=[cell(text, id=f"c{n}") for n, text in enumerate(texts)])
    ours = {one.id: one.source for one in nb.cells}
    assert own_texts(nb, ours) == []
    nb.cells[1].source = "## Summary\n\n1. Why?\n\nAs B is 0.\n2. When?"
    nb.cells[1:1] = [cell("I guess\n\nNext", id="own")]
    nb.cells[-1].source = ""
    assert own_texts(nb, ours) == [("Lesson", "I guess\n\nNext"), ("Summary", "As B is 0.")]


@CONFINED
def test_nothing_else_is_changed(marked):
    _, folder = marked
    assert (folder / "kept").read_text(encoding="utf-8") == "theirs"
    assert not (folder / "new").exists()


def test_the_page_shows_names_as_text(marked):
    page = (marked[1] / "grades.html").read_text(encoding="utf-8")
    assert "<b>ev" not in page and "&lt;b&gt;ev" in page
    held = ("memory", "file size", *(("files",) if has_landlock() else ()))
    assert grade.guards(held) in page
    assert "Passed over: liz/my own.ipynb." in page
    assert "Not on the roster: hal." in page


# ------------------------------------------------------------------ who handed in what


MOE = "Jo Moe_4_assignsubmission_file_x_1_2"


def test_the_layouts_of_platforms_are_found(tmp_path):
    hidden, older = "a/.ipynb_checkpoints/02_lora.ipynb", "a/02_lora.ipynb"
    kept = {
        "a/x/02_lora.ipynb": "a",
        "b/02_lora (1).ipynb": "b",  # of a browser's downloads, and the only one
        "doe_77_5_02_lora-1.ipynb": "doe_77_5",
        "roe_LATE_78_6_02_lora.ipynb": "roe_LATE_78_6",
        "poe_79_6_my_own_02_lora_final (1)-1.ipynb": "poe_79_6_my_own",
        "team_1_1/02_lora.ipynb": "team_1_1",  # two folders, and no attempts of Canvas
        "team_1_2/max_02_lora.ipynb": "team_1_2",
        f"{MOE}_02_lora.ipynb": MOE,
        "hw-kim/peft-lessons/notebooks/03_qlora.ipynb": "hw-kim",
        "lee_03_qlora.ipynb": "lee",
        "Max Poe_9_assignsubmission_file_03_qlora.ipynb": "Max Poe_9_assignsubmission_file",
        "Ina Loe_8_assignsubmission_file/roe_1_2_02_lora.ipynb": "Ina Loe_8_assignsubmission_file",
    }
    passed = {older, "02_lora.ipynb", "a/02_lora (2).ipynb", "a/old_02_lora.ipynb"}
    passed |= {"doe_77_4_02_lora.ipynb", "a/99_other.ipynb"}
    passed |= {"poe_79_5_02_lorax.ipynb", "team_1_1/max_02_lora.ipynb"}
    before = "a/before-update-1/02_lora.ipynb"
    mac = "__MACOSX/._lee_1_2_02_lora.ipynb", "._lee_1_2_02_lora.ipynb"
    for name in (*kept, *passed, hidden, before, *mac):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.utime(tmp_path / older, (0, 0))
    found, over = submissions.handed_in(tmp_path)
    assert {str(one.path.relative_to(tmp_path)): one.who for one in found} == kept
    assert {str(path.relative_to(tmp_path)) for path in over} == passed
    assert [one.who for one in found if one.late] == ["roe_LATE_78_6"]
    # A student cannot pass for one of Canvas's, of which no time is looked at.
    assert [one.who for one in found if one.late is False] == ["doe_77_5", "poe_79_6_my_own"]
    assert submissions.label(MOE) == "Jo Moe"


CANVAS = """Student,ID,SIS User ID,SIS Login ID,Section,Quiz (1)
,,,,,Manual Posting
"    Points Possible",,,,,10
"Doe, Jane",77,A1,jdoe,One,3
"Doe, Janet",78,77,jadoe,One,4
"""


def test_a_row_of_the_roster_is_found(tmp_path):
    file = tmp_path / "roster.csv"
    file.write_bytes(b"\xef\xbb\xbf" + CANVAS.encode())
    people = submissions.read_roster(file)
    assert [person.id for person in people] == ["77", "78"]
    for who, id in {
        "doejane_77_5": "77",
        "doejane_1_5": "77",  # the number is another's, and the name fits
        "doejanet_LATE_78_6": "78",
        "Jane Doe_1234_assignsubmission_file": "77",
        "jadoe": "78",
        "homework-jdoe": "77",
        "nobody": None,
        "One": None,  # it fits two
    }.items():
        assert getattr(submissions.owner(who, people), "id", None) == id, who
    wide = gradebook.wide([Mark("77", "", LESSON, EXERCISE, "right", "", 1, 1, 1)], people)
    assert wide.splitlines()[0].startswith("Student,ID,SIS User ID,SIS Login ID,Section,00_")
    assert wide.splitlines()[1] == "    Points Possible,,,,,1,1,1"


def test_a_number_of_canvas_is_no_other_id_and_an_accent_is_one_letter(tmp_path):
    file = tmp_path / "roster.csv"
    file.write_bytes("id;name\n7;Jürgen Müller\n;Bo Roe\n".encode("utf-16"))  # as Excel saves it
    people = submissions.read_roster(file)
    assert [person.id for person in people] == ["7", "Bo Roe"]
    for who, id in {
        "roebo_7_5": "Bo Roe",
        "stranger_7_5": None,
        "Ju\u0308rgen Mu\u0308ller_7_assignsubmission_file": "7",  # as a Mac writes folders
    }.items():
        assert getattr(submissions.owner(who, people), "id", None) == id, who


def test_a_roster_of_moodle_is_read_and_a_bad_one_is_told(tmp_path):
    file = tmp_path / "roster.csv"
    file.write_text("Identifier;Full name\r\nParticipant 12;Eve Fox\r\n", encoding="utf-8")
    (eve,) = submissions.read_roster(file)
    assert submissions.owner("X_12_assignsubmission_file_", [eve]) == eve
    assert eve.called == "Eve Fox (Participant 12)"
    for text, told in (
        ("a,b\n1,2", "id, email or name"),
        ("id\n1\n1", "'1'"),
        ("id\n", "no student"),
        ("id\nJürgen", 'save it as "CSV UTF-8"'),
    ):
        file.write_text(text, encoding="cp1252")
        with pytest.raises(ValueError, match=told):
            submissions.read_roster(file)


# ------------------------------------------------------------------ points


def test_points_are_the_stars_of_a_heading():
    assert gradebook.stars("02_lora")["apply_lora"] == 3
    assert gradebook.stars("03_qlora")["dequantize_blockwise"] == 1, "two share two stars"
    for lesson in notebooks.MODULES:
        assert set(gradebook.stars(lesson)) == set(notebooks.exercises(lesson))


def test_days_late_are_counted_from_the_due_time_and_an_extension():
    due = datetime(2026, 11, 1, 12)
    rules = Rules(due={LESSON: due}, late=40, extensions={"x": 2})
    for hours, late, student, days in (
        (0, None, "a", 0), (1, None, "a", 1), (25, None, "a", 2), (25, None, "x", 0),
        (50, False, "a", 0), (50, True, "a", 1), (-5, True, "a", 1), (-5, True, "x", 0),
    ):  # fmt: skip
        seconds = due.timestamp() + 3600 * hours
        assert rules.days_late(Handed("w", LESSON, None, late, seconds), student) == days
    assert [rules.share(days) for days in (0, 1, 3)] == [1, 0.6, 0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("points = 3", r"a table, \[points\]"),
        ("late = -1", "late must be a number from 0 on, not -1"),
        ("[pionts]", "no setting 'pionts': did you mean points"),
        ("[points.02_lora]\nmerge = 1", "no exercise of 02_lora 'merge'"),
        ("[points.02_lora]\nmerge_lora = true", "merge_lora must be a number"),
        ("[due]\n02_lora = 3", "due.02_lora must be a time"),
        ("[due]\n2_lora = 2027-01-01T00:00:00", "no lesson '2_lora': did you mean 02_lora"),
        ("late", "is no TOML"),
    ],
)
def test_a_fault_in_the_rules_is_named(text, told, tmp_path):
    (tmp_path / "rules.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        gradebook.read_rules(tmp_path / "rules.toml")


def test_a_cell_is_no_formula_and_no_file_is_half_written(tmp_path, monkeypatch):
    told = '=HYPERLINK("x")'
    marks = [Mark(name, "n", LESSON, EXERCISE, "wrong", told, 1.0) for name in ("-a", "b")]
    handed = [(m.student, Handed(m.student, LESSON, tmp_path, False, 0)) for m in marks]
    group = grade.Class(tmp_path, [], Rules(), handed[:1], [])
    group.marks["-a", LESSON] = marks[:1]
    (tmp_path / "feedback").mkdir()
    (tmp_path / "feedback" / "before.html").touch()
    group.write()
    assert [path.name for path in (tmp_path / "feedback").iterdir()] == ["-a.html"]
    monkeypatch.setattr(gradebook, "csv_of", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        group.write()
    with (tmp_path / "grades.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["student"], row["told"], row["seconds"]) == ("'-a", f"'{told}", "1.0")
    assert not list(tmp_path.rglob("*.part"))


def test_two_students_have_two_pages_on_every_file_system():
    names = ["ann", "a/b", "a:b", "con", "", "..", "x" * 300, "x" * 301, "𐀀" * 63]
    names += ["né", "ne\u0301", "Jo", "jo"]
    files = list(gradebook.file_names(names).values())
    assert len({unicodedata.normalize("NFC", file).casefold() for file in files}) == len(names)
    assert files[0] == "ann" and not any("/" in file or ":" in file for file in files)
    assert all(len(f"{file}.html.part".encode()) < 255 for file in files)


def test_the_commonest_fault_of_an_exercise_is_its_cause():
    told = ["x\n  Likely cause: not summed", "y\n  Likely cause: not summed", "y", ""]
    outcomes = ["wrong", "wrong", "crashed", "right"]
    marks = [Mark("a", "", LESSON, EXERCISE, o, t, 0) for o, t in zip(outcomes, told, strict=True)]
    marks.append(Mark("a", "", LESSON, EXERCISE, "not attempted", "", 0))
    assert gradebook.commonest(marks) == [(f"{LESSON} {EXERCISE}", 1, 1, 5, "not summed", 2)]


def test_a_damaged_notebook_is_the_commonest_fault_of_no_exercise():
    marks = [Mark(s, "", LESSON, e, "crashed", "damaged", 0) for s in "abc" for e in "xy"]
    marks += [Mark("d", "", LESSON, e, "wrong", f"{e}: all off", 0) for e in "xy"]
    rows = gradebook.commonest(marks)
    assert rows == [(f"{LESSON} {e}", 0, 0, 4, f"{e}: all off", 1) for e in "xy"]


# ------------------------------------------------------------------ the process of a notebook


@pytest.fixture
def instead(tmp_path, monkeypatch):
    """Let a script take the place of a notebook's process, and return what becomes of it."""
    python = sys.executable

    def outcome(script, notebook=None, **limits):
        program = tmp_path / "python"
        program.write_text(f"#!{python}\nimport sys\n{script}\n", encoding="utf-8")
        program.chmod(0o755)
        if notebook is None:
            notebook = tmp_path / f"{LESSON}.ipynb"
            notebook.write_text("{}", encoding="utf-8")
        monkeypatch.setattr(sys, "executable", str(program))
        found = grade.judge(notebook, LESSON, grade.Limits(**({"total": 30} | limits)))
        return tuple(found.said.get(EXERCISE, found.rest)[:2]), found

    return outcome


def test_a_notebook_that_swallows_its_time_limit_is_stopped_and_one_that_dies_quoted(instead):
    assert instead(DEAF, total=2)[0] == ("timed out", "the notebook took longer than 2 s")
    told = "the notebook's process ended with 1. Too bad"
    assert instead("print('no', file=sys.stderr)\nsys.exit('Too bad')")[0] == ("crashed", told)


def test_an_interruption_ends_what_runs_and_remembers_nothing_of_it(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nsleep 60\n", encoding="utf-8")
    program.chmod(0o755)
    (tmp_path / f"a_{LESSON}.ipynb").write_text("{}", encoding="utf-8")

    def interrupted(waiting):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(grade, "as_completed", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        grade.main([str(tmp_path)])
    assert time.monotonic() - started < 30
    assert (tmp_path / "grades.html").exists() and not (tmp_path / grade.MARKED).exists()
    assert not grade.INTERRUPTED.is_set()


def test_memory_that_the_system_does_not_limit_is_watched(instead):
    child = "import subprocess, time; a = bytearray(3 * 10**8); time.sleep(20)"
    script = f"import subprocess\nsubprocess.run([{sys.executable!r}, '-c', {child!r}])"
    told = "the notebook took more than 0.2 GiB of memory"
    assert instead(script, memory=0.2)[0] == ("crashed", told)


MACOS = """import resource
real = resource.setrlimit
def refuse(kind, most):
    if kind == resource.RLIMIT_DATA:
        raise ValueError("current limit exceeds maximum limit")
    real(kind, most)
resource.setrlimit = refuse"""
WINDOWS = """import signal
grade_one.resource = None
del signal.SIGALRM, signal.setitimer"""


@pytest.mark.parametrize(("system", "held"), [(MACOS, ["file size"]), (WINDOWS, [])])
def test_a_system_with_fewer_limits_marks_all_the_same(system, held, instead, tmp_path):
    script = f"""from tools import grade_one
grade_one.has_landlock = lambda: False
{system}
grade_one.main(sys.argv[3:])"""
    hand_in(tmp_path / f"{LESSON}.ipynb", f"import torch\n{RIGHT}", "while True:\n    pass")
    outcome, found = instead(script, tmp_path / f"{LESSON}.ipynb", total=60, seconds=1)
    assert (outcome[0], found.held) == ("right", held)
    assert "WITH ALL YOUR FILES IN REACH" in grade.guards(found.held)
    assert "Memory was watched, not limited by the system." in grade.guards(found.held)


def test_a_mark_must_be_whole_and_carry_the_word(instead):
    for change, outcome in (
        ("", "right"),
        ("mark['word'] = ''", "crashed"),
        ("mark['outcome'] = 'excellent'", "crashed"),
        ("del mark['told']", "crashed"),
    ):
        script = f"""import json
mark = dict(word=input(), exercise={EXERCISE!r}, outcome="right", told="", seconds=1)
{change}
print("{{", json.dumps(mark), sep="\\n")"""
        assert instead(script)[0][0] == outcome


@CONFINED
def test_a_second_thread_would_be_free(tmp_path, monkeypatch):
    failing = lambda *_: pytest.fail("it did not look before")  # noqa: E731
    monkeypatch.setattr(grade_one.resource, "setrlimit", failing)
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


# ------------------------------------------------------------------ a notebook's cells


@pytest.fixture
def outcome_of(monkeypatch):
    """Run cells as a notebook's, and return the outcome of the exercise."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    before = signal.signal(signal.SIGALRM, grade_one._alarm)
    shell = grade_one.new_shell()

    def outcome(*sources, seconds=9):
        cells = [nbformat.v4.new_code_cell(source) for source in ("import torch", *sources)]
        nb = nbformat.v4.new_notebook(cells=cells)
        why = grade_one.run(nb, shell, seconds).get(EXERCISE)
        return grade_one.judged(
            getattr(check.start, EXERCISE), shell.user_ns.get(EXERCISE), seconds, why
        )

    yield outcome
    InteractiveShell.clear_instance()
    signal.signal(signal.SIGALRM, before)


RAISES = f"def {EXERCISE}(weight):\n    raise {{}}"
MUTE = f"""class Mute(BaseException):
    def __str__(self):
        raise RuntimeError
{RAISES.format("Mute")}"""
SWALLOWS = f"""import time
def {EXERCISE}(weight):
    for _ in range(3):
        try:
            time.sleep(1)
        except Exception:
            pass"""


@pytest.mark.parametrize(
    ("sources", "outcome", "told"),
    [
        ([RIGHT], "right", ""),
        ([RIGHT, "1 / 0"], "right", ""),
        ([WRONG], "wrong", "Likely cause: "),
        ([RAISES.format("NotImplementedError")], "not attempted", ""),
        (["1"], "not attempted", "does not define it"),
        (["from peft_lessons import evaluate as row_norms"], "not attempted", "not define it"),
        ([f"def {EXERCISE}(weight:\n    return 1"], "crashed", "SyntaxError"),
        ([f"{RIGHT}\n1 / 0", f"{EXERCISE} = None"], "crashed", "its cell fails: ZeroDivision"),
        ([RAISES.format('ValueError("\\ud800")')], "wrong", r"raised ValueError: \ud800"),
        ([MUTE], "crashed", "Mute"),
    ],
)
def test_outcomes(sources, outcome, told, outcome_of):
    got = outcome_of(*sources)
    assert got[0] == outcome and told in grade.printable(got[1])


def test_an_endless_cell_and_an_answer_that_catches_every_exception_end_in_time(outcome_of):
    late = ("timed out", "longer than 0.5 s")
    assert outcome_of(SWALLOWS, seconds=0.5) == late
    assert outcome_of(ENDLESS, RIGHT, seconds=0.5)[0] == "right"
    assert outcome_of(f"{RIGHT}\n{ENDLESS}", seconds=0.5)[0] == "right"
    stopped = outcome_of(f"{ENDLESS}\n{RIGHT}", f"{EXERCISE} = None", seconds=0.5)
    assert stopped == ("timed out", "its cell fails: longer than 0.5 s")


# ------------------------------------------------------------------ a folder


def test_points_add_up_in_all_tables(tmp_path):
    lesson = "03_qlora"
    rules = Rules({lesson: dict.fromkeys(notebooks.exercises(lesson), 1 / 3)}, late=10)
    said = {exercise: ["right", "", 1] for exercise in notebooks.exercises(lesson)}
    one = Handed("a_LATE_1_2", lesson, tmp_path, True, 0)
    marks = grade.marks_of(one, "a", "n", grade.Judged(said, []), rules)
    cells = next(csv.DictReader(gradebook.wide(marks, []).splitlines()))
    summed = sum(float(cells[f"{lesson} {exercise}"]) for exercise in said)
    assert gradebook.tidy(summed) == float(cells["total"]) == gradebook.total(marks)[0]
    assert {mark.points for mark in marks} == {0.3}


def test_a_folder_of_moodle_in_no_encoding_has_feedback():
    folder = os.fsdecode(b"M\xfcller_12_assignsubmission_file_my")
    archive = gradebook.moodle_archive({"M": "page"}, {folder: "M", "else": "M"})
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        (name,) = file.namelist()
    assert name.endswith("ller_12_assignsubmission_file_/feedback.html")


def test_a_folder_without_notebooks_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path)])
    assert "02_lora.ipynb" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, capsys, monkeypatch):
    (tmp_path / "ann_02_lora.ipynb").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path)])
    assert "must be writable" in capsys.readouterr().err


def test_a_link_is_not_opened(tmp_path):
    target = tmp_path / "target.ipynb"
    target.write_text("{}", encoding="utf-8")
    link = tmp_path / "link.ipynb"
    link.symlink_to(target)
    assert "link" in grade.judge(link, LESSON, grade.Limits()).rest[1]


def test_students_with_one_file_or_one_name_are_named(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("x" if name < "c" else "y", encoding="utf-8")
    found = [(name, Handed(name, LESSON, tmp_path / name, False, 0)) for name in ("a", "b", "c")]
    assert grade.alike(found) == [told := f"The same file of {LESSON}, byte for byte: a, b."]
    for outcome in ("right", "not attempted"):  # then it is the notebook that was handed out
        group = grade.Class(tmp_path, [], Rules(), found, [])
        for name, _ in found:
            group.marks[name, LESSON] = [Mark(name, "", LESSON, EXERCISE, outcome, "", 0)]
        group.write()
        page = (tmp_path / "grades.html").read_text(encoding="utf-8")
        assert (told in page) == (outcome == "right")
    twins = [Handed(f"Jo_{n}_assignsubmission_file", LESSON, tmp_path, False, 0) for n in (1, 2)]
    later = Handed("Jo_3_assignsubmission_file", "02_lora", tmp_path, False, 0)
    pairs, notes = grade.owners([*twins, later], [])
    assert [student for student, _ in pairs] == [one.who for one in (*twins, later)]
    assert notes == ["Several students are called Jo and marked apart."]
    pairs, _ = grade.owners([twins[0], later], [])
    assert [student for student, _ in pairs] == ["Jo", "Jo"], "one student, two lessons"
    pairs, notes = grade.owners(twins, [Person("1", "Jo", {"id": "1", "name": "Jo"})])
    assert [student for student, _ in pairs] == ["1", twins[1].who]
    assert len(notes) == 1 and "marked apart" in notes[0]
    _, notes = grade.owners(twins[:1], [Person("1", "Al", {"id": "1"})])
    assert notes == [f"Not on the roster: {twins[0].who}."]


# ------------------------------------------------------------------ Gradescope


def test_an_autograder_holds_the_course_without_its_answers(tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text(f"{RULES}[points.02_lora]\nmerge_lora = 2\n", encoding="utf-8")
    path = gradescope.archive(LESSON, rules, tmp_path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        run = archive.read("run_autograder").decode()
        assert archive.getinfo("setup.sh").external_attr >> 16 & 0o111, "it must be executable"
    assert "--mark" in run and LESSON in run and "LESSON" not in run
    assert "course/rules.toml" in names, "and the rules need each lesson that they name"
    assert {f"course/notebooks/{stem}.ipynb" for stem in (LESSON, "02_lora")} <= {*names}
    assert not [name for name in names if "solutions" in name or "/tests/" in name]


def test_the_notebook_of_a_submission_is_the_one_of_the_lesson(tmp_path):
    for name, chosen in (
        ("__MACOSX/._02_lora.ipynb", None),
        ("mine.ipynb", "mine.ipynb"),
        (".ipynb_checkpoints/02_lora-checkpoint.ipynb", "mine.ipynb"),
        ("02_lora.ipynb", "02_lora.ipynb"),
        ("jane_02_lora (1).ipynb", "02_lora.ipynb"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        assert gradescope.submitted(tmp_path, "02_lora") == (chosen and tmp_path / chosen)


def test_results_are_points_and_what_the_check_says(tmp_path, monkeypatch):
    student = {"users": [{"email": "ann@example.org"}]}
    (tmp_path / "submission_metadata.json").write_text(json.dumps(student), encoding="utf-8")
    (tmp_path / "submission").mkdir()
    assert "no notebook" in gradescope.results(tmp_path, LESSON, Rules())["output"]
    (tmp_path / "submission" / "any name.ipynb").touch()
    said = {EXERCISE: ["wrong", "Likely cause: x", 1.0]}
    seen = []
    monkeypatch.setattr(
        grade, "judge", lambda *a: seen.append(a) or grade.Judged(said, [], ["memory"])
    )
    (test,) = gradescope.results(tmp_path, LESSON, Rules())["tests"]
    assert (test["score"], test["max_score"], test["status"]) == (0, 1, "failed")
    assert test["output"] == "wrong: Likely cause: x"
    assert seen[0][3] == grade.variant_of("ann@example.org", "")
    said[EXERCISE] = ["right", "", 1.0]
    assert gradescope.main([LESSON, "--mark", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))
    assert told["tests"][0]["score"] == 1
