"""Grade students' notebooks: python -m tools.grade FOLDER [--jobs 2]

FOLDER holds a folder for each student, and in it, at any depth, notebooks that are named as the
lessons are: nbgrader's submitted/<student>/<lesson>/<lesson>.ipynb fits. Each notebook runs in a
process of its own, and each function that it was to define is judged by the course's check,
whatever became of the cells that call it. FOLDER/grades.csv and FOLDER/grades.html then say,
exercise by exercise: right, wrong (with the cause that the check names), not attempted, crashed, or
timed out.

A notebook has no network, writes to a temporary folder of its own, and has limits of time, memory
and size of files: what it does costs itself its marks and nothing else. On Linux the kernel sees to
it, by namespaces and Landlock; where it cannot, the page says so.
"""

import argparse
import csv
import html
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
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


def submissions(folder: Path) -> list[tuple[str, Path, str]]:
    """(student, notebook, lesson) of the notebooks in a folder that are named as a lesson is."""
    found = []
    for path in sorted(folder.rglob("*.ipynb")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)  # Jupyter's checkpoints
        if len(parts) > 1 and not hidden and path.stem in notebooks.MODULES:
            found.append((parts[0], path, path.stem))
    return found


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
    started = time.monotonic()
    if path.is_symlink() or path.stat().st_size > LARGEST:
        said, rest = {}, ("crashed", "the notebook is a link, or larger than 20 MB")
    else:
        said, rest = said_of(path, lesson, limits)
    took = time.monotonic() - started
    return [
        Mark(student, name, lesson, exercise, *said.get(exercise, (*rest, round(took, 1))))
        for exercise in notebooks.exercises(lesson)
    ]


def said_of(path: Path, lesson: str, limits: Limits) -> tuple[dict[str, tuple], tuple[str, str]]:
    """({exercise: (outcome, told, seconds)}, (outcome, told) of the exercises that aren't there)"""
    word = secrets.token_hex(16)
    temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with temporary as place, tempfile.TemporaryFile() as errors:
        folder = Path(place).resolve()
        copied = shutil.copyfile(path, folder / path.name)
        env = offline_environment()
        env |= dict.fromkeys(("HOME", "TMPDIR", "IPYTHONDIR", "MPLCONFIGDIR"), str(folder))
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env["PYTHONPATH"]])
        ours, theirs = os.pipe()
        told = (copied, lesson, limits.seconds, limits.memory, theirs)
        process = subprocess.Popen(
            [*namespaces(), sys.executable, "-m", "tools.grade_one", *map(str, told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=env,
            cwd=folder,
            pass_fds=(theirs,),
            start_new_session=True,
        )
        os.close(theirs)
        try:
            process.stdin.write(f"{word}\n".encode())
            process.stdin.close()
            text, late = heard(ours, time.monotonic() + limits.total)
        finally:
            os.close(ours)
            end(process)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 1000))
        last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
    said = {}
    for line in text.splitlines():
        with suppress(ValueError, TypeError, KeyError):  # anybody may write to a channel
            mark = json.loads(line)
            if mark["word"] == word and mark["outcome"] in OUTCOMES:
                said[mark["exercise"]] = mark["outcome"], mark["told"], round(mark["seconds"], 1)
    if late:
        return said, ("timed out", f"the notebook took longer than {limits.total:g} s")
    return said, ("crashed", f"the notebook's process ended with {process.returncode}. {last}")


def heard(channel: int, deadline: float) -> tuple[str, bool]:
    """(what comes from a channel until it is closed or says too much, whether that came late)"""
    parts, size, late = [], 0, False
    while size < MOST_SAID:
        ready, _, _ = select.select([channel], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            late = True
            break
        if not (part := os.read(channel, 65536)):
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts).decode(errors="replace"), late


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  color-scheme: light dark }
table { border-collapse: collapse; margin-bottom: 2em; width: 100% }
th, td { border-bottom: 1px solid #8886; padding: .3em .6em; text-align: left;
  vertical-align: top }
td.told { white-space: pre-wrap; font-size: .9em }
.right { color: #2e8540 } .wrong, .crashed, .timed-out { color: #d1462f }
"""


def page(marks: Sequence[Mark]) -> str:
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
        f"<style>{STYLE}</style><h1>Marks</h1><p>{guards()}</p>{''.join(parts)}</html>"
    )


def write(marks: Sequence[Mark], folder: Path) -> None:
    with (folder / "grades.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Mark))
        writer.writerows(map(astuple, marks))
    (folder / "grades.html").write_text(page(marks), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.grade", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="of one cell or check")
    parser.add_argument("--total", type=float, default=600, help="seconds of one notebook")
    parser.add_argument("--memory", type=float, default=4, help="GiB")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at once")
    given = parser.parse_args(argv)
    found = submissions(given.folder) if given.folder.is_dir() else []
    if not found:
        parser.error(
            f"{given.folder} holds no <student>/…/<lesson>.ipynb with the name of a lesson, such "
            "as 02_lora.ipynb"
        )
    limits = Limits(given.seconds, given.total, given.memory)
    marks: list[Mark] = []

    def one(submission: tuple[str, Path, str]) -> list[Mark]:
        student, path, lesson = submission
        return grade(student, path, lesson, str(path.relative_to(given.folder)), limits)

    with ThreadPoolExecutor(given.jobs) as pool:
        for (student, _, lesson), new in zip(found, pool.map(one, found), strict=True):
            counts = Counter(mark.outcome for mark in new)
            told = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o])
            print(f"{student:20s} {lesson:20s} {told}", flush=True)
            marks += new
            write(marks, given.folder)  # what is done stays, if this is interrupted
    print(f"{guards()}\n{given.folder / 'grades.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
