"""What students hand in is marked by the course's checks, whatever a notebook does."""

import copy
import csv
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch.utils._device import DeviceContext

from classroom import grade, grade_one, gradebook, release
from classroom.grade_one import has_landlock, own_texts
from classroom.gradebook import Rules
from classroom.submissions import LARGEST, Handed
from peft_lessons import check
from tools import notebooks

if not sys.platform.startswith("linux"):
    pytest.skip("the scripts and notebooks of these tests are Linux's", allow_module_level=True)

LESSON = "00_start_here"
(EXERCISE,) = notebooks.exercises(LESSON)
RIGHT = notebooks.read_solutions(notebooks.NOTEBOOKS / f"{LESSON}.ipynb")[EXERCISE]
WRONG = f"def {EXERCISE}(shapes, rank):\n    return sum(rank * (m + n) for m, n in shapes)"
PARTLY = f"""import math


def {EXERCISE}(shapes, rank):
    least = (min(math.prod(shape), rank * sum(shape)) for shape in shapes)
    return sum(least) + (len(shapes) == 2)"""
# By all names that the checks have.
FAKE = """from peft_lessons import check, checks
from peft_lessons.checks import kit
from peft_lessons.checks.start import lora_parameters as known
kit.Check.__call__ = lambda self, function: kit.Verdict("right", "right", "right")
kit.Compared._facts = lambda self, function: iter(["right"])
check.start.lora_parameters.tolerance, checks.start.lora_parameters.causes = 1e9, {}
try:
    import __mp_main__
    __mp_main__.outcome_of_check = lambda *args, **others: ("right", "")
except ImportError:
    pass
import json
real = json.dumps
json.dumps = lambda told, **how: real(told, **how).replace('"wrong"', '"right"')"""
ASKS = f"""def {EXERCISE}(shapes, rank):
    ones = known, check.start.lora_parameters, checks.start.lora_parameters
    asked = [one.reference(shapes, rank) for one in ones]
    return next((told for told in asked if isinstance(told, int)), None)"""
# It asserts its own mark on every channel that it may find, and ends the process.
FORGES = f"""import os
mark = ["mark", "{EXERCISE}", "right", "", "0", "1"]
for channel in range(64):
    try:
        os.write(channel, " ".join(["0" * 32, *(m.encode().hex() for m in mark)]).encode() + b"\\n")
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
    answers = "notebooks/solutions/start.py", "peft_lessons/checks/start.py", "classroom/tests/*"
    reads = " ".join(str(notebooks.ROOT / place) for place in answers)
    return f"""{RIGHT.replace(f"def {EXERCISE}", "def honest")}


def tried(command):
    import subprocess
    return subprocess.run(["bash", "-c", command], capture_output=True).returncode == 0


def {EXERCISE}(shapes, rank):
    assert tried("true") and tried("touch mine")
    assert not tried("echo more >> {folder}/kept") and not tried("rm {folder}/kept")
    assert not tried("touch {folder}/new")
    assert not tried("for file in {reads}; do cat $file && exit; done; exit 1")
    assert not tried("exec 3<>/dev/tcp/127.0.0.1/{port}")
    assert not tried("cat ../marks") and not tried("truncate -s 300M mine")
    try:
        bytearray(5 * 2**30)
    except MemoryError:
        return honest(shapes, rank)"""


# It is right only if the check draws other numbers than in the notebook.
ONE = getattr(check.start, EXERCISE)
SHOWN = [shapes for shapes, _ in map(ONE.arguments, range(len(ONE.cases))) if len(shapes) == 5]
OTHER = f"""{RIGHT.replace(f"def {EXERCISE}", "def honest")}


def {EXERCISE}(shapes, rank):
    assert shapes not in {SHOWN}
    return honest(shapes, rank)"""


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


# ------------------------------------------------------------------ the process of a notebook


@pytest.fixture
def instead(tmp_path, monkeypatch):
    """Let a script take the place of a notebook's process, and return what becomes of it."""
    python = sys.executable

    def outcome(script, notebook=None, lesson=LESSON, **limits):
        program = tmp_path / "python"
        program.write_text(f"#!{python}\nimport sys\n{script}\n", encoding="utf-8")
        program.chmod(0o755)
        if notebook is None:
            notebook = tmp_path / f"{LESSON}.ipynb"
            notebook.write_text("{}", encoding="utf-8")
        monkeypatch.setattr(sys, "executable", str(program))
        result = grade.judge(notebook, lesson, grade.Limits(**({"total": 30} | limits)))
        return result.judgments.get(EXERCISE, result.rest)[:2], result

    return outcome


# A process that says what classroom.grade_one would: first what held.
SPEAKS = """import os, time
word, skip = input(), sys.argv[-1].split(",")
def say(*told):
    print(word, *(text.encode().hex() for text in told), flush=True)
say("found", "held", "[]")"""


def test_a_fault_of_the_marking_is_told_costs_nothing_and_is_forgotten(instead, tmp_path):
    reasons = {
        "sys.exit('No space left on device')": "ended with 1. No space left on device",
        f"{SPEAKS}\nos._exit({grade_one.TROUBLE})": f"ended with {grade_one.TROUBLE}. ",
    }
    if not grade.namespaces():
        reasons[f"{SPEAKS}\nos.kill(os.getpid(), 9)"] = "ended with -9. "
    for script, why in reasons.items():
        message = f"by no fault of the notebook: its process {why}"
        assert instead(script)[0] == (gradebook.UNMARKED, message)
    path = tmp_path / f"{LESSON}.ipynb"
    one = Handed("ann", LESSON, path, None, 0, path.name)
    result = grade.remembered(one, "ann", tmp_path, grade.Limits(total=30), "", False)
    assert not result.lasting and not list((tmp_path / grade.MARKED).glob("*.json"))
    group = grade.Class(tmp_path, [], Rules(), [("ann", one)], [])
    group.add("ann", one, 0, result)
    assert group.write() == [] and "that is not theirs: ann (" in " ".join(group.remarks())
    assert gradebook.wide(group.everyone(), []).splitlines()[1] == "ann,,,,1"
    assert read(tmp_path)["ann"]["points"] == ""


def test_who_ends_twice_at_one_place_ends_himself(instead):
    twice = ("crashed", "here the notebook's process ended twice")
    answer = f"say('at', {EXERCISE!r})\nos._exit({grade_one.TROUBLE})"
    assert instead(f"{SPEAKS}\n{answer}")[0] == twice


def test_a_notebook_ends_with_the_marking(instead, tmp_path):
    if not grade.with_us():
        pytest.skip("this system has no setpriv")
    process = [*grade.with_us(), *grade.namespaces(), "sleep", "60"]
    script = f"import subprocess, os; print(subprocess.Popen({process}).pid, flush=True); input()"
    marker = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child = psutil.Process(int(marker.stdout.readline()))
    time.sleep(0.3)
    family = [child, *child.children(recursive=True)]
    marker.kill()
    _, left = psutil.wait_procs(family, timeout=10)
    assert not left
    marker.communicate()


def test_a_process_that_is_killed_from_outside_is_no_fault_of_the_notebook(instead):
    killer = threading.Timer(1, lambda: [p.kill() for p in psutil.Process().children(True)])
    killer.start()
    outcome, result = instead(f"{SPEAKS}\ntime.sleep(20)")
    killer.join()
    assert outcome[0] == gradebook.UNMARKED and not result.lasting


def test_a_file_that_cannot_be_read_does_not_stop_the_class(tmp_path, monkeypatch, capsys):
    for name in ("ann", "bob"):
        (tmp_path / f"{name}_{LESSON}.ipynb").write_text(name, encoding="utf-8")
    real = Path.read_bytes

    def read_bytes(path):
        if path.name.startswith("ann"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    right = grade.Result({EXERCISE: grade.Judgment("right", "", 0.0, 1.0)})
    monkeypatch.setattr(grade, "judge", lambda *a: right)
    assert grade.main([str(tmp_path)]) == 1
    rows = read(tmp_path)
    assert (rows["ann"]["outcome"], rows["bob"]["outcome"]) == (gradebook.UNMARKED, "right")
    assert rows["ann"]["told"].endswith("the file cannot be read: Permission denied")
    printed = capsys.readouterr().out
    assert printed.startswith("Notebooks: 2. At once: "), "before the first is marked"
    assert "Not marked: ann (00_start_here). The same command" in printed


def test_the_time_of_a_file_that_a_notebook_changed_is_set_back(tmp_path, monkeypatch, capsys):
    path = tmp_path / f"bob_{LESSON}.ipynb"
    path.write_text("{}", encoding="utf-8")
    os.utime(path, (5, 5))
    monkeypatch.setattr(
        grade, "judge", lambda *a: os.utime(path) or grade.Result({}, grade.Judgment("wrong", ""))
    )
    grade.main([str(tmp_path)])
    assert path.stat().st_mtime == 5
    note = f"The time of {path.name} changed meanwhile, and is set back."
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "grades.html").read_text(encoding="utf-8")


def test_a_notebook_cannot_fill_the_disk(instead, monkeypatch):
    monkeypatch.setattr(grade, "WRITTEN", 2**24)
    judgment = ("crashed", "the notebook wrote more than 1 GiB, or a quarter of the free disk")
    writes = "file = open('more', 'wb'); file.write(bytes(2**25)); file.flush()"
    deep = "for _ in range(150): os.mkdir('d'); os.chdir('d')"
    assert instead(f"{SPEAKS}\n{deep}\ntime.sleep(20)")[0] == judgment
    for removes in ("", "os.remove('more')"):  # such a file takes room, too
        assert instead(f"{SPEAKS}\n{writes}\n{removes}\ntime.sleep(20)")[0] == judgment
    monkeypatch.setattr(grade.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**24))
    judgment = (gradebook.UNMARKED, "by no fault of the notebook: the disk is full")
    assert instead(f"{SPEAKS}\ntime.sleep(20)")[0] == judgment


HANGS = """for number, cell in enumerate(["a cell", "a slow cell"]):
    if str(number) not in skip and not (number and "cells" in skip):
        say("at", str(number))
        time.sleep(20 if number == 0 else 0)
for name in {names}:
    if name not in skip:
        say("at", name)
        time.sleep(20 if name == {hangs} else 0)
        if name == {dies}:
            os._exit(3)
        say("mark", name, "right", "", "1", "1")"""


def test_what_hangs_or_dies_costs_no_answer_but_its_own(instead, monkeypatch):
    monkeypatch.setattr(grade, "quiet", lambda limits: 1)
    lesson = "03_qlora"
    names = notebooks.exercises(lesson)
    script = HANGS.format(names=names, hangs=repr(names[1]), dies=repr(names[4]))
    _, result = instead(f"{SPEAKS}\n{script}", lesson=lesson)
    outcomes = {name: one.outcome for name, one in result.judgments.items()}
    wanted = dict.fromkeys(names, "right") | {names[1]: "timed out", names[4]: "crashed"}
    assert outcomes == wanted and result.lasting
    assert result.judgments[names[1]].message == "the notebook took longer than 1 s"


def test_after_a_time_limit_in_its_cells_a_notebook_is_judged_by_what_it_defines(instead):
    script = f"""for number in range(99):
    if "cells" in skip:
        break
    say("at", str(number))
    time.sleep(0.5)
say("at", {EXERCISE!r})
say("mark", {EXERCISE!r}, "right", "", "1", "1")"""
    assert instead(f"{SPEAKS}\n{script}", total=2)[0][0] == "right"


def test_all_processes_of_a_notebook_together_have_three_times_its_limit(tmp_path, monkeypatch):
    clock, totals = [0.0], []

    def takes(seconds):
        def one_round(path, lesson, limits, variant, skip):
            totals.append(limits.total)
            clock[0] += seconds
            return grade.Round({}, grade.Judgment("timed out", ""), at=str(len(totals)))

        return one_round

    monkeypatch.setattr(grade, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(grade, "_round", takes(8))
    (tmp_path / "a.ipynb").write_text("{}", encoding="utf-8")
    grade.judge(tmp_path / "a.ipynb", LESSON, grade.Limits(total=10))
    assert totals == [10, 10, 10, 6]


def test_cells_that_end_the_process_one_after_another_come_to_an_end(instead):
    script = """for number in range(99):
    if str(number) not in skip:
        say("at", str(number))
        os._exit(3)"""
    outcome, _ = instead(f"{SPEAKS}\n{script}")
    assert outcome == ("crashed", "the notebook's process ended with 3. ")


def test_what_a_process_leaves_behind_ends_with_it(instead, monkeypatch, tmp_path):
    grade.adopts.cache_clear()
    monkeypatch.setattr(grade, "namespaces", lambda: ())
    script = f"""{SPEAKS}
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    with open({str(tmp_path / "pid")!r}, "w") as file:
        file.write(str(os.getpid()))
    for channel in range(3):
        os.close(channel)
    time.sleep(60)
time.sleep(1)"""
    instead(script)
    grade.adopts.cache_clear()
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text(encoding="utf-8")))


@pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock")
def test_a_notebook_signals_nobody_but_its_own_where_the_kernel_holds_it():
    script = """import os, signal, subprocess, sys
from classroom.grade_one import hold_signals
if not hold_signals():
    sys.exit(2)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
child.kill()
child.wait()
try:
    os.kill(os.getppid(), 0)
except PermissionError:
    sys.exit(0)"""
    done = subprocess.run([sys.executable, "-c", script], cwd=notebooks.ROOT)
    if done.returncode == 2:
        pytest.skip("this kernel's Landlock holds no signals")
    assert done.returncode == 0


@pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock")
def test_a_course_that_each_notebook_could_read_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "ann_02_lora.ipynb").touch()
    monkeypatch.setattr(grade, "opened", lambda: [tmp_path.parent])
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path)])
    assert f"below {tmp_path.parent}, which each notebook may read" in capsys.readouterr().err
    monkeypatch.setattr(grade, "opened", lambda: [notebooks.ROOT])
    with pytest.raises(ValueError, match="The course lies in"):
        grade.refuse_open(tmp_path)
    assert not {Path("/opt"), Path("/etc"), Path("/home")} & {*grade_one.opened()}


def test_a_notebook_that_swallows_its_time_limit_is_stopped_and_one_that_dies_quoted(instead):
    judgment = ("timed out", "the notebook took longer than 2 s")
    assert instead(f"{SPEAKS}\n{DEAF}", total=2)[0] == judgment
    message = "the notebook's process ended with 1. Too bad"
    dies = "print('no', file=sys.stderr)\nsys.exit('Too bad')"
    assert instead(f"{SPEAKS}\n{dies}")[0] == ("crashed", message)


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
    assert (tmp_path / "grades.html").exists()
    assert not list((tmp_path / grade.MARKED).glob("*.json"))
    assert not grade.INTERRUPTED.is_set()


def test_memory_that_the_system_does_not_limit_is_watched(instead):
    child = "import subprocess, time; a = bytearray(3 * 10**8); time.sleep(20)"
    script = f"import subprocess\nsubprocess.run([{sys.executable!r}, '-c', {child!r}])"
    message = "the notebook took more than 0.2 GiB of memory"
    assert instead(script, memory=0.2)[0] == ("crashed", message)


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
    script = f"""from classroom import grade_one
grade_one.has_landlock = lambda: False
{system}
grade_one.main(sys.argv[3:])"""
    hand_in(tmp_path / f"{LESSON}.ipynb", f"import torch\n{RIGHT}", "while True:\n    pass")
    outcome, result = instead(script, tmp_path / f"{LESSON}.ipynb", total=60, seconds=1)
    assert (outcome[0], [name for name in result.held if name != "network"]) == ("right", held)
    assert "WITH ALL YOUR FILES IN REACH" in grade.guards(result.held)
    assert "Memory was watched, not limited by the system." in grade.guards(result.held)


def test_a_mark_must_be_whole_and_carry_the_word(instead):
    for change, outcome in (
        ("", "right"),
        ("word = 'another'", "crashed"),
        ("mark[2] = 'excellent'", "crashed"),
        ("del mark[3]", "crashed"),
        ("mark[4] = 'long'", "crashed"),
    ):
        mark = ["mark", EXERCISE, "right", "", "1", "1"]
        assert instead(f"{SPEAKS}\nmark = {mark}\n{change}\nsay(*mark)")[0][0] == outcome


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

    lesson = grade_one.Lesson(LESSON, notebooks.read(notebooks.NOTEBOOKS / f"{LESSON}.ipynb"))
    lesson.long.add("long")

    def outcome(*sources, seconds=9, skip=()):
        sources = [
            one if isinstance(one, tuple) else (one, ()) for one in ("import torch", *sources)
        ]
        cells = [
            nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)}, id=f"cell-{number}")
            for number, (source, tags) in enumerate(sources)
        ]
        for cell in cells:
            if "long" in cell.metadata.tags:
                cell.id = "long"
        nb = nbformat.v4.new_notebook(cells=cells)
        ran = grade_one.run(nb, lesson, shell, seconds, skip=skip)
        one = getattr(check.start, EXERCISE)
        return grade_one.outcome_of_answer(one, ran, EXERCISE, shell.user_ns, seconds)

    yield outcome
    InteractiveShell.clear_instance()
    signal.signal(signal.SIGALRM, before)


RAISES = f"def {EXERCISE}(shapes, rank):\n    raise {{}}"
MUTE = f"""class Mute(BaseException):
    def __str__(self):
        raise RuntimeError
{RAISES.format("Mute")}"""
SWALLOWS = f"""import time
def {EXERCISE}(shapes, rank):
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
        ([f"from peft_lessons import evaluate as {EXERCISE}"], "not attempted", "not define it"),
        ([f"def {EXERCISE}(shapes:\n    return 1"], "crashed", "SyntaxError"),
        ([f"{RIGHT}\n1 / 0", f"{EXERCISE} = None"], "crashed", "its cell fails: ZeroDivision"),
        ([RAISES.format('ValueError("\\ud800")')], "wrong", r"raised ValueError: \ud800"),
        ([MUTE], "crashed", "Mute"),
        ([f"{RIGHT}\n1 / 0", f"{RIGHT}\n{EXERCISE} = None"], "not attempted", "not define it"),
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


STUB = next(
    cell.source
    for cell in notebooks.code_cells(notebooks.read(notebooks.NOTEBOOKS / f"{LESSON}.ipynb"))
    if "exercise" in notebooks.tags(cell)
)
CHECK = f"check.start.{EXERCISE}({EXERCISE})"
LEAST = "def least(shape, rank):\n    return min(shape[0] * shape[1], rank * sum(shape))"
EARLIER = f"# Of an earlier copy of the lesson\n{RIGHT}"
AS_T = f"""def {EXERCISE}(shapes, rank):
    m, n = t.tensor(shapes).T
    return t.minimum(m * n, rank * (m + n)).sum()"""
OF_A_CLASS = f"""class Count:
    def __call__(self, shapes, rank):
        return sum(least(shape, rank) for shape in shapes)


{EXERCISE} = Count()"""
BY_LEAST = f"def {EXERCISE}(shapes, rank):\n    return sum(least(s, rank) for s in shapes)"


@pytest.mark.parametrize(
    ("cells", "outcome"),
    [
        ([WRONG, EARLIER], "wrong"),
        ([STUB, EARLIER], "not attempted"),
        ([STUB, (RIGHT, ["plumbing"])], "right"),  # a copy of a cell has its tags
        ([(f"{RIGHT}\n{CHECK}", ["check"])], "right"),
        ([BY_LEAST, (f"{LEAST}\n{CHECK}", ["check"])], "right"),
        ([(f"{RIGHT}\nglobals().pop({EXERCISE!r})", ["long"])], "right"),  # what it defines
        ([BY_LEAST, LEAST, CHECK, "least = None"], "right"),  # as it was at its check
        ([BY_LEAST, LEAST, f"{CHECK}\nprint(1)", "least = None"], "right"),
        ([OF_A_CLASS, LEAST, CHECK, "least = None"], "right"),
        (["import math\nfrom google.colab import drive\nimport torch as t", AS_T], "right"),
        (["%matplotlib inline\n!true\nimport torch as t", AS_T], "right"),
        ([f"{RIGHT}\n{EXERCISE}.__module__ = 'peft_lessons'"], "right"),
        ([f"from peft_lessons import evaluate as {EXERCISE}"], "not attempted"),
        ([RIGHT, (STUB, ["exercise"])], "right"),  # as an update leaves it
        ([RIGHT, WRONG], "wrong"),
        ([f"{EXERCISE} = None", RIGHT], "right"),
    ],
)
def test_an_answer_is_what_stands_in_the_students_cells(cells, outcome, outcome_of, monkeypatch):
    cells = [(cell, ["exercise"]) if isinstance(cell, str) else cell for cell in cells]
    digest = hashlib.sha256(EARLIER.encode()).hexdigest()[:16]
    monkeypatch.setattr(grade_one, "EARLIER", {digest})
    assert outcome_of("check = None", *cells)[0] == outcome


def test_where_cells_hang_only_what_they_define_is_run(outcome_of):
    cells = [f"import math, time\nWIDTH = 1\n{LEAST}\ntime.sleep(60)", "1 +", "time.sleep(60)"]
    answer = BY_LEAST.replace("return", "assert WIDTH == 1 and math\n    return")
    assert outcome_of(*cells, answer, skip=["cells"], seconds=1)[0] == "right"
    helper, other = (text.replace("least", "others") for text in (cells[0], BY_LEAST))
    assert outcome_of(helper, other, skip=["1", "1d"])[0] == "wrong", "its cell is left out"
    left_out = ("crashed", "its cell fails: it hangs, or ends the notebook's process")
    assert outcome_of(RIGHT, skip=["1", "1d"]) == left_out
    assert outcome_of(f"{RIGHT}\n1 / 0", skip=["1"])[0] == "right", "what it defines is run"


def test_a_second_judgment_leaves_the_names_as_they_are():
    def never_right(function, help):
        raise AssertionError(str(space))

    ran, space = grade_one.Ran({"f": abs}, spaces={"f": {"width": 1}}), {"width": 2}
    got = grade_one.outcome_of_answer(never_right, ran, "f", space, 9)
    assert got == ("wrong", "{'width': 2}") and space == {"width": 2}


def test_an_alarm_that_comes_after_its_block_does_nothing():
    with grade_one.at_most(60):
        pass
    grade_one._alarm(signal.SIGALRM, None)


def test_nothing_can_be_computed_with_what_takes_the_place_of_the_checks():
    verdict = grade_one.Unchecked().start.lora_parameters(abs, help=True)
    assert "not checked here" in repr(verdict) and verdict.status != "right"
    assert grade_one.Unchecked().yours(abs) is abs  # a lesson goes on with the student's function
    for compute in (float, int, len, list, lambda one: one + 1, lambda one: one["status"]):
        with pytest.raises(TypeError):
            compute(verdict)


def test_a_wrong_answer_earns_nothing_for_what_stood_in_the_exercise():
    stem = "15_assistant"
    lesson = grade_one.Lesson(stem, notebooks.read(notebooks.NOTEBOOKS / f"{stem}.ipynb"))
    stub, name = lesson.stubs["preference_step"], "preference_step"
    space = {}
    exec(
        f"""import torch
from torch import nn
from peft_lessons import disabled
from peft_lessons.train.preferences import answer_logprob, preference_loss
PreTrainedTokenizerBase = object
{grade_one.without_raise(stub)}""",
        space,
    )
    shares = [grade_one.earned(check.assistant.preference_step, space[name], stub, space, 60)]
    mended = grade_one.without_raise(stub)
    for fault, mend in (
        ("labels[ids == tokenizer.pad_token_id] = -100", "pass"),
        ("with torch.no_grad():", "with torch.no_grad(), disabled(model):"),
    ):
        assert mended.count(fault) == 1
        mended = mended.replace(fault, mend)
        exec(mended, space)
        one = check.assistant.preference_step
        shares.append(grade_one.earned(one, space[name], stub, space, 60))
    assert shares == [0, 0.25, 0.5]


def test_a_share_counts_from_what_the_exercises_own_text_earns():
    one = SimpleNamespace(__name__="part", credit=lambda function: function())
    stub = "def part():\n    raise NotImplementedError\n    return 0.2"
    shares = [grade_one.earned(one, lambda s=s: s, stub, {}, 9) for s in (0.1, 0.2, 0.6, 1.0)]
    assert shares == pytest.approx([0, 0, 0.5, 1])


def notebook(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("Mine"), *cells])


@pytest.fixture(scope="module")
def lora():
    stem = "02_lora"
    return grade_one.Lesson(stem, notebooks.read(notebooks.NOTEBOOKS / f"{stem}.ipynb"))


def test_a_hunt_earns_what_is_mended_and_its_page_names_a_cause(lora):
    name, space = "apply_lora", {}
    stub, one = lora.stubs[name], check.lora.apply_lora
    exec(
        f"""from torch import nn
from peft_lessons import LinearWithLoRA
{grade_one.without_raise(stub)}
given = apply_lora
def apply_lora(model, rank, alpha, targets):
    return given(model.requires_grad_(False), rank, alpha, targets)""",
        space,
    )
    assert grade_one.earned(one, space[name], stub, space, 60) == 0.25
    outcome, message = grade_one.outcome_of_check(one, space[name], 60)
    assert outcome == "wrong" and message.startswith("apply_lora: 1 of 4 faults is mended.")
    assert "Likely cause: targets match anywhere in a name" in message


def test_cells_that_an_answer_has_no_business_with_are_named(lora):
    cells = [
        "import gc\ngc.collect()",
        "import sys\nsys . modules['x'] = 1",
        "torch.testing.assert_close = print\ntorch.allclose == 1",
        "class A:\n    def __eq__(self, other):\n        return True",
        "frame = sys._getframe().f_back",
        "from torch import Tensor as T\nQ = type(torch.ones(1))",
        "Q.abs = lambda self: 0",
    ]
    odd = dict(grade_one.odd_cells(notebook(*cells), lora))
    assert list(odd) == [3, 4, 5, 6, 8]
    assert odd[8] == "Q.abs ="
    assert odd[6] == "_getframe, f_back" and "torch.testing.assert_close =" in odd[4]
    assert grade_one.odd_cells(lora.nb, lora) == []


def test_answers_are_alike_that_differ_in_names_spaces_and_comments_only(lora):
    answers = notebooks.read_solutions(notebooks.NOTEBOOKS / "02_lora.ipynb")
    answer = answers["compress_lora"]
    renamed = re.sub(r"\bS\b", "sizes", answer).replace("return", "# mine\n    return")
    other = answer.replace("return", "rank = int(rank)\n    return", 1)
    (mine,), (theirs,), (others,) = (
        grade_one.prints(notebook(one), lora).values() for one in (answer, renamed, other)
    )
    assert mine == theirs != others
    started = grade_one.without_raise(lora.stubs["apply_lora"])
    for cell in ("def swap_words(W):\n    return W", started, lora.stubs["swap_words"], "def x(:"):
        assert grade_one.prints(notebook(cell), lora) == {}, "nobody's own"
    assert grade_one.prints(lora.nb, lora) == {}


def test_a_cell_is_the_courses_also_as_colab_shows_it(lora):
    for cell in release.folded_in_colab(copy.deepcopy(lora.nb)).cells:
        assert cell.cell_type != "code" or lora.has(cell)


def test_a_check_finds_pytorch_as_it_was(monkeypatch):
    calm = grade_one.Calm()
    x, known = torch.ones(2), torch.allclose
    monkeypatch.setattr(torch, "allclose", lambda *args: True)
    monkeypatch.setattr("builtins.abs", lambda number: 0)
    torch.Tensor.abs = torch.Tensor.norm = lambda self: self * 0
    mode = DeviceContext("meta")
    mode.__enter__()
    torch.set_default_device("meta:0")
    calm()
    assert torch.allclose is known and abs(-1) == 1 and float(-x.abs().sum()) == -2
    assert float(2 * x.norm() ** 2) == pytest.approx(4) and torch.get_default_device().type == "cpu"
    assert torch.ones(1).device.type == "cpu" and not torch._C._len_torch_function_stack()


def test_of_a_changed_cell_only_what_the_student_wrote_is_a_text():
    cell = nbformat.v4.new_markdown_cell
    texts = ["# Lesson", "## Summary\n\n1. Why?\n2. When?", "Next"]
    nb = nbformat.v4.new_notebook(cells=[cell(text, id=f"c{n}") for n, text in enumerate(texts)])
    lesson_cells = {one.id: one.source for one in nb.cells}
    assert own_texts(nb, lesson_cells) == []
    nb.cells[1].source = "## Summary\n\n1. Why?\n\nAs B is 0.\n2. When?"
    nb.cells[1:1] = [cell("I guess\n\nNext", id="own")]
    nb.cells[-1].source = ""
    assert own_texts(nb, lesson_cells) == [("Lesson", "I guess\n\nNext"), ("Summary", "As B is 0.")]


def test_a_folder_without_notebooks_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        grade.main([str(tmp_path)])
    assert "02_lora.ipynb" in capsys.readouterr().err


def test_a_lesson_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "ann_02_lora.ipynb").touch()
    for arguments, message in (
        ([str(tmp_path), "--lesson", "2"], "no lesson starts with 2: write two digits"),
        ([str(tmp_path / "no")], "there is no folder"),
    ):
        with pytest.raises(SystemExit):
            grade.parse(arguments)
        assert message in capsys.readouterr().err


def test_two_commands_do_not_mark_one_folder_at_once(tmp_path, capsys):
    (tmp_path / "ann_02_lora.ipynb").touch()
    options = grade.parse([str(tmp_path)])
    with pytest.raises(SystemExit):
        grade.parse([str(tmp_path)])
    options.lock.close()
    grade.parse([str(tmp_path)]).lock.close()
    assert f"another command marks {tmp_path} just now" in capsys.readouterr().err


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
    assert "link" in grade.judge(link, LESSON, grade.Limits()).rest.message
    os.truncate(target, LARGEST + 1)
    assert grade.judge(target, LESSON, grade.Limits()) == grade.judge(link, LESSON, grade.Limits())


# ------------------------------------------------------------------ a class


ROSTER = """id,name,email
7,"Roe, Ann",ann@example.org
8,"Doe, Gus",gus@example.org
9,"Poe, Max",max@example.org
"""
RULES = f"""late = 25
partial = true
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
    # Only the notebook's own tensors are on the meta device.
    before = "import torch\ntorch.set_default_device('meta')"
    hand_in(folder / ANN, OTHER, before, drop="check")
    hand_in(folder / EVE / f"{LESSON}.ipynb", ASKS, FAKE)
    deeper = "## Deeper · Beyond (3 min)"
    hand_in(folder / GUS / f"{LESSON}.ipynb", RIGHT, "import torch", heading=deeper)
    hand_in(folder / "hal" / LESSON / f"{LESSON}.ipynb", curious(folder, port), "import torch")
    hand_in(folder / "ida" / f"{LESSON}.ipynb", PARTLY, FORGES)
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
        "ida": ("wrong", "1.6"),  # its cell ends the process, and the answer is judged without it
        "jon": ("crashed", "0.0"),
        "kim": ("crashed", "0.0"),
        "liz": ("crashed", "0.0"),
    }
    damaged = "the file is damaged: hand in a notebook that JupyterLab opens (NotJSONError)"
    assert marked[0]["kim"]["told"] == damaged
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
    monkeypatch.setattr(grade, "judge", lambda path, *a: seen.append(a) or grade.Result())
    for student, seed, again in (("8", "secret", True), ("8", "other", False), ("x", "secret", 0)):
        grade.remembered(one, student, folder, grade.Limits(), seed, again)
    assert len({variant for *_, variant in seen}) == 3


def test_after_a_correction_of_the_course_everything_is_judged_anew(tmp_path, monkeypatch):
    files = ["peft_lessons/checks/start.py", "peft_lessons/engine/injection.py"]
    files += [f"notebooks/{LESSON}.ipynb", "classroom/grade_one.py", "tools/notebooks.py"]
    files += ["classroom/grade.py"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(grade, "ROOT", tmp_path)
    (tmp_path / "ann.ipynb").write_text("{}", encoding="utf-8")
    one = Handed("ann", LESSON, tmp_path / "ann.ipynb", None, 0)
    judged = []
    monkeypatch.setattr(grade, "judge", lambda *a: judged.append(a) or grade.Result())
    (tmp_path / grade.MARKED).mkdir()
    for changed in [None, *files]:
        if changed:
            (tmp_path / changed).write_text("# corrected", encoding="utf-8")
        for _ in range(2):
            grade.course.cache_clear()
            grade.remembered(one, "ann", tmp_path, grade.Limits(), "", False)
    grade.course.cache_clear()
    assert len(judged) == 1 + len(files)
    grade.remembered(one, "ann", tmp_path, grade.Limits(seconds=90), "", False)
    assert len(judged) == 2 + len(files), "what took too long may come to an end"
    other = replace(one, lesson="02_lora")
    grade.remembered(other, "ann", tmp_path, grade.Limits(), "", False)
    assert len(judged) == 3 + len(files), "in another lesson the same file is another notebook"


def test_another_version_of_a_package_that_the_checks_use_is_another_course(monkeypatch):
    hashes = set()
    for changed in ("", "torch", "peft", "transformers"):
        monkeypatch.setattr(grade, "version", lambda name, c=changed: "2" if name == c else "1")
        grade.course.cache_clear()
        hashes.add(grade.course())
    grade.course.cache_clear()
    assert len(hashes) == 4


def test_a_page_of_feedback_shows_nobody_else(marked):
    rows, folder = marked
    pages = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("feedback/*")}
    assert len(pages) == len(rows)
    assert "Roe, Ann (7)" in pages["7"] and "3 of 4 points" in pages["7"]
    assert "1 day late: 75% of its points count" in pages["7"]
    assert f"judged: {ANN}, attempt 2" in pages["7"] and "<td>0.1</td>" in pages["7"]
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
    columns = [f"{LESSON} {EXERCISE}", f"{LESSON} total", "total", "maximum"]
    assert head == ["id", "name", "email", *columns]
    assert ann == ["7", "Roe, Ann", "ann@example.org", "3", "3", "3", "4"]
    with (marked[1] / "texts.csv").open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    assert ["8", LESSON, "## Deeper · Beyond (3 min)"] in [[r[0], r[1], r[3]] for r in rows]


@CONFINED
def test_nothing_else_is_changed(marked):
    _, folder = marked
    assert (folder / "kept").read_text(encoding="utf-8") == "theirs"
    assert not (folder / "new").exists()


def test_the_page_shows_names_as_text(marked):
    page = (marked[1] / "grades.html").read_text(encoding="utf-8")
    assert "<b>ev" not in page and "&lt;b&gt;ev" in page
    held = ["memory", "file size", *["files"] * has_landlock()]
    held += ["network"] * bool(grade.namespaces())
    assert grade.guards(held) in page
    assert "Passed over: liz/my own.ipynb (its name contains the name of no lesson)." in page
    assert "Not on the roster: hal." in page
    odd = re.findall(r"Look at it by eye: ([^,]+), 00_start_here, cell \d+: ([^.]*)", page)
    assert [(who, "_exit" in words, "__mp_main__" in words) for who, words in odd] == [
        (r"&lt;b&gt;ev\udce9", False, True),
        ("hal", False, False),  # who tries to read the solutions
        ("ida", True, False),
    ]


# ------------------------------------------------------------------ whole lessons

# Processes of notebooks that start with what most lessons import, which takes longest.
FORKS = """import os, sys, tempfile, warnings
from pathlib import Path
from classroom import grade_one
warnings.simplefilter("ignore")
import peft, peft_lessons.checks, transformers, trl
for path in map(Path, sys.argv[1:]):
    child = os.fork()
    if child == 0:
        os.chdir(path.parent)
        os.environ.update(dict.fromkeys(["HOME", "TMPDIR", "IPYTHONDIR"], str(path.parent)))
        tempfile.tempdir = None
        os.dup2(os.open(path.with_name("word"), os.O_RDONLY), 0)
        os.dup2(os.open(path.with_name("marks"), os.O_WRONLY | os.O_CREAT), 1)
        grade_one.main([str(path), path.stem, "60", "4", "1000", "cells"])
    os.waitpid(child, 0)"""


def outcomes_of_lessons(folder, handed):
    """{(lesson, exercise): its outcome} of notebooks by the lesson, of which the process runs only
    what defines something, with the inputs of another student than in the notebook."""
    paths = []
    for lesson, nb in handed.items():
        paths.append(folder / lesson / f"{lesson}.ipynb")
        paths[-1].parent.mkdir()
        paths[-1].with_name("word").write_text("word\n", encoding="utf-8")
        nbformat.write(nb, paths[-1])
    command = [sys.executable, "-c", FORKS, *map(str, paths)]
    env = grade.environment(folder)
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    outcomes = {}
    for path in paths:
        lines = path.with_name("marks").read_text(encoding="utf-8").splitlines()
        judgments, _, at = grade.heard(lines, "word")
        outcomes |= {(path.stem, name): outcome for name, (outcome, *_) in judgments.items()}
        assert judgments.keys() == {*notebooks.exercises(path.stem)}, f"{at}: {done.stderr}"
    return outcomes


def test_no_lesson_as_it_is_handed_out_has_a_right_answer(tmp_path):
    released = {p.stem: release.without_answers(notebooks.read(p)) for p in notebooks.lessons()}
    assert {*outcomes_of_lessons(tmp_path, released).values()} == {"not attempted"}


def test_every_lesson_with_its_solutions_has_only_right_answers(tmp_path):
    solved = {}
    for path in notebooks.lessons():
        solved[path.stem], answers = notebooks.read(path), notebooks.read_solutions(path)
        for cell in notebooks.exercise_cells(solved[path.stem]):
            cell.source = answers[notebooks.exercise_name(cell)]
    wrong = {n: o for n, o in outcomes_of_lessons(tmp_path, solved).items() if o != "right"}
    assert not wrong
