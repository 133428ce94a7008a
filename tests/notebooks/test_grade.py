"""What students hand in is marked by the course's checks, whatever a notebook does."""

import csv
import os
import signal
import socket
import sys
import threading

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

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


def hand_in(folder, student, answer="", before="", drop="", heading="### Exercise"):
    """A student's notebook: an answer in the place of the stub, before it a heading and a cell."""
    nb = notebooks.read(notebooks.NOTEBOOKS / f"{LESSON}.ipynb")
    nb.cells = [cell for cell in nb.cells if drop not in notebooks.tags(cell)]
    at = next(i for i, cell in enumerate(nb.cells) if "exercise" in notebooks.tags(cell))
    nb.cells[at].source = answer or nb.cells[at].source
    first = nbformat.v4.new_code_cell(before, metadata={"tags": ["plumbing"]})
    nb.cells[at:at] = [nbformat.v4.new_markdown_cell(heading), first]
    nb.cells = nb.cells[max(0, at - 3) :]  # the set-up would only take time
    nb = notebooks.clean(nb, LESSON)
    path = folder / student / LESSON / f"{LESSON}.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(nb, path)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """{student: (outcome, told)} of a class, and its folder."""
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "kept").write_text("theirs", encoding="utf-8")
    server = socket.create_server(("127.0.0.1", 0))
    hand_in(folder, "ann, no checks", RIGHT, "import torch", drop="check")
    hand_in(folder, os.fsdecode(b"<b>ev\xe9"), ASKS, FAKE)
    hand_in(folder, "gus", RIGHT, "import torch", heading="## Deeper · Beyond (3 min)")
    hand_in(folder, "hal", curious(folder, server.getsockname()[1]), "import torch")
    hand_in(folder, "ida", RIGHT, FORGES)
    (folder / "liz" / f"{LESSON}.ipynb").mkdir(parents=True)
    (folder / "liz" / "my own.ipynb").write_text("not of this course", encoding="utf-8")
    with server:
        assert grade.main([str(folder), "--jobs", "2"]) == 0
    with (folder / "grades.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all((row["lesson"], row["exercise"]) == (LESSON, EXERCISE) for row in rows)
    return {row["student"]: (row["outcome"], row["told"]) for row in rows}, folder


def test_a_class_is_marked(marked):
    assert {student: outcome for student, (outcome, _) in marked[0].items()} == {
        "ann, no checks": "right",
        r"<b>ev\udce9": "wrong",
        "gus": "right",
        "hal": "right" if grade.namespaces() and has_landlock() else "crashed",
        "ida": "crashed",
        "liz": "crashed",
    }


@CONFINED
def test_nothing_else_is_changed(marked):
    _, folder = marked
    assert (folder / "kept").read_text(encoding="utf-8") == "theirs"
    assert not (folder / "new").exists()


def test_the_page_shows_names_as_text(marked):
    page = (marked[1] / "grades.html").read_text(encoding="utf-8")
    assert "<b>ev" not in page and "&lt;b&gt;ev" in page
    assert grade.guards() in page
    assert "Passed over: liz/my own.ipynb." in page


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


# ------------------------------------------------------------------ the process of a notebook


@pytest.fixture
def instead(tmp_path, monkeypatch):
    """Let a script take the place of a notebook's process, and return what becomes of it."""
    python = sys.executable

    def marks(script, total=30):
        program, notebook = tmp_path / "python", tmp_path / f"{LESSON}.ipynb"
        program.write_text(f"#!{python}\nimport sys\n{script}\n", encoding="utf-8")
        program.chmod(0o755)
        notebook.touch()
        monkeypatch.setattr(sys, "executable", str(program))
        (mark,) = grade.grade("ann", notebook, LESSON, "n", grade.Limits(total=total))
        return mark.outcome, mark.told

    return marks


def test_a_notebook_that_swallows_its_time_limit_is_stopped_and_one_that_dies_quoted(instead):
    assert instead(DEAF, total=2) == ("timed out", "the notebook took longer than 2 s")
    told = "the notebook's process ended with 1. Too bad"
    assert instead("print('no', file=sys.stderr)\nsys.exit('Too bad')") == ("crashed", told)


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
print("{{", json.dumps(mark), sep="\\n", file=open(int(sys.argv[-1]), "w"))"""
        assert instead(script)[0] == outcome


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


def test_a_folder_without_notebooks_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path)])
    assert "02_lora.ipynb" in capsys.readouterr().err


def test_a_link_is_not_opened(tmp_path):
    target = tmp_path / "target.ipynb"
    target.write_text("{}", encoding="utf-8")
    link = tmp_path / "link.ipynb"
    link.symlink_to(target)
    (mark,) = grade.grade("kim", link, LESSON, "link", grade.Limits())
    assert mark.outcome == "crashed" and "link" in mark.told
