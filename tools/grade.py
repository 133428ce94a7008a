"""Grade students' notebooks: python -m tools.grade FOLDER [--jobs 2]

FOLDER holds a folder for each student, and in it, at any depth, notebooks that are named as the
lessons are: nbgrader's submitted/<student>/<lesson>/<lesson>.ipynb fits. Of two of one lesson the
newer one counts; what is passed over is named. Each notebook runs in a
process of its own, and each function that it was to define is judged by the course's check,
whatever became of the cells that call it. FOLDER/grades.csv and FOLDER/grades.html then say,
exercise by exercise: right, wrong (with the cause that the check names), not attempted, crashed, or
timed out.

A notebook has no network, writes to a temporary folder of its own, and has limits of time, memory
and size of files. Whatever comes of it, the others are marked. On Linux the kernel sees to the
limits, by namespaces and Landlock; where it cannot, the page says so. What they do not hold is in
docs/instructors.md.
"""

import argparse
import csv
import html
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from functools import cache
from itertools import groupby
from pathlib import Path

from tools import notebooks
from tools.environment import ROOT, offline_environment
from tools.grade_one import has_landlock

OUTCOMES = ("right", "wrong", "not attempted", "crashed", "timed out")
LARGEST = 20_000_000  # bytes of a notebook
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
INHERITED = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")  # nothing else of whoever marks
FORMULA = tuple("=+-@\t\r")  # what a spreadsheet would compute
MOST_SAID = 1_000_000  # bytes of marks that a notebook's process may send


@dataclass(frozen=True)
class Limits:
    """seconds of one cell or one check; total, seconds of a notebook; memory in GiB."""

    seconds: float = 60
    total: float = 600
    memory: float = 4


@dataclass(frozen=True)
class Mark:
    student: str
    notebook: str
    lesson: str
    exercise: str
    outcome: str
    told: str
    seconds: float


def submissions(folder: Path) -> tuple[list[tuple[str, Path, str]], list[Path]]:
    """(student, notebook, lesson) of the notebooks in a folder that are named as a lesson is, the
    newest of each student's for a lesson; and the notebooks, and folders, that are passed over."""
    handed: dict[tuple[str, str], list[tuple[float, Path]]] = defaultdict(list)
    passed: list[Path] = []
    for here, folders, files in os.walk(folder, onerror=lambda e: passed.append(Path(e.filename))):
        folders[:] = [name for name in folders if not name.startswith(".")]  # Jupyter's checkpoints
        for path in (Path(here, name) for name in folders + files if name.endswith(".ipynb")):
            student, *inner = path.relative_to(folder).parts
            if inner and path.stem in notebooks.MODULES:
                handed[student, path.stem].append((path.lstat().st_mtime, path))
            else:
                passed.append(path)
    found = []
    for (student, lesson), paths in handed.items():
        *older, (_, newest) = sorted(paths)
        found.append((student, newest, lesson))
        passed += [path for _, path in older]
    return sorted(found), sorted(passed)


def printable(text: object, kept: str = "") -> str:
    """A text in which control characters, except those `kept`, and what no encoding knows are
    spelt out: two names stay two."""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in str(text))


@cache
def namespaces() -> tuple[str, ...]:
    """The command that starts another without network, whose processes all end with it."""
    command = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    try:
        tried = subprocess.run([*command, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if tried.returncode == 0 else ()


def guards() -> str:
    """What holds a notebook on this machine, as a sentence."""
    network = "without network" if namespaces() else "without network for Python code"
    files = "in a folder of its own" if has_landlock() else "WITH ALL YOUR FILES IN REACH"
    return f"Each notebook ran {network}, {files}, with limits of time and memory."


def grade(student: str, path: Path, lesson: str, name: str, limits: Limits) -> list[Mark]:
    """The marks of one notebook, `name` on the page, one for each exercise of its lesson."""
    started, said = time.monotonic(), {}
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
            rest = "crashed", "the notebook is a link, no file, or larger than 20 MB"
        else:
            said, rest = said_of(path, lesson, limits)
    except Exception as error:  # whatever it is, the others are marked
        rest = "crashed", f"it cannot be marked: {type(error).__name__}: {error}"
    took = round(time.monotonic() - started, 1)
    marks = {e: said.get(e, (*rest, took)) for e in notebooks.exercises(lesson)}
    who, where = printable(student), printable(name)
    return [
        Mark(who, where, lesson, exercise, outcome, printable(told, kept="\n"), seconds)
        for exercise, (outcome, told, seconds) in marks.items()
    ]


def environment(folder: Path) -> dict[str, str]:
    """Of a notebook's process: its home is a folder of its own."""
    env = offline_environment({name: os.environ[name] for name in INHERITED if name in os.environ})
    env |= dict.fromkeys(("HOME", "TMPDIR", "IPYTHONDIR", "MPLCONFIGDIR"), str(folder)) | ONE_THREAD
    return env | {"PYTHONPATH": os.pathsep.join([str(ROOT), env["PYTHONPATH"]])}


def said_of(path: Path, lesson: str, limits: Limits) -> tuple[dict[str, tuple], tuple[str, str]]:
    """({exercise: (outcome, told, seconds)}, (outcome, told) of the exercises that aren't there)"""
    word = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place,
        open(Path(place, "marks"), "ab") as marks,  # and not to read: the word is in it
        tempfile.TemporaryFile() as errors,
    ):
        folder = Path(place).resolve() / "own"
        folder.mkdir()
        copied = shutil.copyfile(path, folder / path.name)
        told = (copied, lesson, limits.seconds, limits.memory, marks.fileno())
        process = subprocess.Popen(
            [*namespaces(), sys.executable, "-m", "tools.grade_one", *map(str, told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment(folder),
            cwd=folder,
            pass_fds=(marks.fileno(),),
            start_new_session=True,
        )
        try:
            process.communicate(f"{word}\n".encode(), timeout=limits.total)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and all that it started
            process.wait()
        with open(marks.name, "rb") as written:
            lines = written.read(MOST_SAID).decode(errors="replace").splitlines()
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 1000))
        last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
    said = {}
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):  # the notebook may write there, too
            mark = json.loads(line)
            if mark["word"] == word and mark["outcome"] in OUTCOMES:
                said[mark["exercise"]] = mark["outcome"], mark["told"], round(mark["seconds"], 1)
    if late:
        return said, ("timed out", f"the notebook took longer than {limits.total:g} s")
    return said, ("crashed", f"the notebook's process ended with {process.returncode}. {last}")


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  color-scheme: light dark }
table { border-collapse: collapse; margin-bottom: 2em; width: 100% }
th, td { border-bottom: 1px solid #8886; padding: .3em .6em; text-align: left;
  vertical-align: top }
td.told { white-space: pre-wrap; font-size: .9em }
.right { color: #2e8540 } .wrong, .crashed, .timed-out { color: #d1462f }
"""


def page(marks: Sequence[Mark], passed: str) -> str:
    """All marks as HTML: a table of counts, then a table for each student."""
    quoted = html.escape
    students = {s: list(m) for s, m in groupby(marks, key=lambda mark: mark.student)}
    counts = [(s, Counter(mark.outcome for mark in found)) for s, found in students.items()]
    head = "".join(f"<th>{outcome}</th>" for outcome in OUTCOMES)
    lines = "".join(
        f"<tr><td><a href='#{n}'>{quoted(student)}</a></td>"
        + "".join(f"<td>{count[outcome] or ''}</td>" for outcome in OUTCOMES)
        + "</tr>"
        for n, (student, count) in enumerate(counts)
    )
    parts = [f"<table><tr><th>student</th>{head}</tr>{lines}</table>"]
    for n, (student, found) in enumerate(students.items()):
        rows = "".join(
            f"<tr><td>{quoted(m.notebook)}</td><td>{m.exercise}</td>"
            f"<td class='{m.outcome.replace(' ', '-')}'>{m.outcome}</td>"
            f"<td class='told'>{quoted(m.told)}</td></tr>"
            for m in found
        )
        head = "<tr><th>notebook</th><th>exercise</th><th>outcome</th><th>what the check says</th>"
        parts.append(f"<h2 id='{n}'>{quoted(student)}</h2><table>{head}</tr>{rows}</table>")
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Marks</title>"
        "<meta name='viewport' content='width=device-width'>"
        f"<style>{STYLE}</style><h1>Marks</h1><p>{guards()} {quoted(passed)}</p>"
        f"{''.join(parts)}</html>"
    )


def write(marks: Sequence[Mark], folder: Path, passed: str) -> None:
    """Both files, each whole or as it was before."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(field.name for field in fields(Mark))
    writer.writerows([_text(cell) for cell in astuple(mark)] for mark in marks)
    for name, text in (("grades.csv", table.getvalue()), ("grades.html", page(marks, passed))):
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8", newline="")
        part.replace(folder / name)


def _text(cell: object) -> object:
    """No formula, whatever a spreadsheet makes of it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.grade", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="of one cell or check")
    parser.add_argument("--total", type=float, default=600, help="seconds of one notebook")
    parser.add_argument("--memory", type=float, default=4, help="GiB")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at once")
    given = parser.parse_args(argv)
    found, passed = submissions(given.folder) if given.folder.is_dir() else ([], [])
    if not found:
        parser.error(
            f"{given.folder} holds no <student>/…/<lesson>.ipynb with the name of a lesson, such "
            "as 02_lora.ipynb"
        )
    limits = Limits(given.seconds, given.total, given.memory)
    names = ", ".join(printable(path.relative_to(given.folder)) for path in passed)
    over = f"Passed over: {names}." if passed else ""
    marks: list[Mark] = []

    def one(submission: tuple[str, Path, str]) -> list[Mark]:
        student, path, lesson = submission
        return grade(student, path, lesson, str(path.relative_to(given.folder)), limits)

    with ThreadPoolExecutor(given.jobs) as pool:
        for (student, _, lesson), new in zip(found, pool.map(one, found), strict=True):
            counts = Counter(mark.outcome for mark in new)
            told = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o])
            print(f"{printable(student):20s} {lesson:20s} {told}", flush=True)
            marks += new
            write(marks, given.folder, over)  # what is done stays, if this is interrupted
    print("\n".join(filter(None, (over, guards(), str(given.folder / "grades.html")))))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names in another alphabet than a terminal's
    raise SystemExit(main())
