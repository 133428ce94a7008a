"""Mark students' notebooks: python -m tools.grade FOLDER [--roster FILE] [--rules FILE]

FOLDER holds what students handed in, as Canvas, Moodle, nbgrader or a hub of repositories hands it
over; tools/submissions.py has the layouts. Each notebook runs in a process of its own, and each
function that it was to define is judged by the course's check, whatever became of the cells that
call it. In FOLDER then lie

    grades.html       the whole class, with what could not be isolated on this system
    grades.csv        a row an exercise: right, wrong with the cause that the check names, ...
    grades_wide.csv   a row a student, a column an exercise: for Canvas, Moodle or a spreadsheet
    feedback/         a page for each student that shows nobody else
    texts.csv         markdown cells of the students' own: predictions, answers to questions

What is unchanged since an earlier run is not run again: FOLDER/.marked remembers it. A notebook has
no network, writes to a temporary folder of its own, and has limits of time, memory and size of
files, as far as the system can set them; grades.html says which. Whatever comes of a notebook, the
others are marked. What the limits do not hold is in docs/instructors.md.
"""

import argparse
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import astuple, dataclass, field, fields
from functools import cache
from pathlib import Path

import psutil

from peft_lessons.data import limits as machine
from tools import gradebook
from tools.environment import ROOT, offline_environment
from tools.gradebook import ABSENT, OUTCOMES, Mark, Rules, write_file
from tools.submissions import (
    Handed,
    Person,
    handed_in,
    label,
    owner,
    printable,
    read_roster,
)

LARGEST = 20_000_000  # bytes of a notebook
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Nothing else of whoever marks; Windows starts no program without the last five.
INHERITED = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
INHERITED += ("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT")
OWN_FOLDER = ("HOME", "TMPDIR", "IPYTHONDIR", "MPLCONFIGDIR")
OWN_FOLDER += ("USERPROFILE", "APPDATA", "LOCALAPPDATA", "TEMP", "TMP")
MOST_SAID = 1_000_000  # bytes of marks that a notebook's process may send
LOOK = 0.2  # seconds between two looks at a notebook's process
EACH = 2  # GiB that one notebook may well take: so many run at once as have that
MARKED = ".marked"
INTERRUPTED = threading.Event()


@dataclass(frozen=True)
class Limits:
    """Set the seconds of one cell or check, the seconds of a notebook in `total`, and GiB of
    memory."""

    seconds: float = 60
    total: float = 600
    memory: float = 4


@dataclass(frozen=True)
class Judged:
    """What became of a notebook: {exercise: (outcome, what is said, seconds)}, the same of the
    exercises of which nothing was said, the limits that held, texts of the student's own."""

    said: dict[str, list]
    rest: list
    held: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)


# ------------------------------------------------------------------ one notebook


@cache
def namespaces() -> tuple[str, ...]:
    """The command that starts another without network, whose processes all end with it."""
    if sys.platform != "linux":
        return ()
    command = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    try:
        tried = subprocess.run([*command, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if tried.returncode == 0 else ()


def guards(held: Iterable[str]) -> str:
    """Return what held the notebooks, as a sentence; `held` is what their processes could set."""
    held = set(held)
    network = "without network" if namespaces() else "without network for Python code"
    files = "in a folder of its own" if "files" in held else "WITH ALL YOUR FILES IN REACH"
    kinds = ["time", "memory", *(["size of files"] if "file size" in held else [])]
    watched = "" if "memory" in held else " Memory was watched, not limited by the system."
    limited = f"{', '.join(kinds[:-1])} and {kinds[-1]}"
    return f"Each notebook ran {network}, {files}, with limits of {limited}.{watched}"


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a notebook's process: its home is a folder of its own."""
    env = offline_environment({name: os.environ[name] for name in INHERITED if name in os.environ})
    env |= dict.fromkeys(OWN_FOLDER, str(folder)) | ONE_THREAD
    return env | {"PYTHONPATH": os.pathsep.join([str(ROOT), env["PYTHONPATH"]])}


def judge(path: Path, lesson: str, limits: Limits, variant: int = 0) -> Judged:
    """Return what becomes of a notebook, whatever it is; `variant` chooses the checks' inputs."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
            return Judged({}, ["crashed", "the notebook is a link, no file, or larger than 20 MB"])
        if not path.stat().st_size:
            return Judged({}, ["crashed", "the notebook is an empty file"])
        return _judge(path, lesson, limits, variant)
    except Exception as error:  # whatever it is, the others are marked
        return Judged({}, ["crashed", f"it cannot be marked: {type(error).__name__}: {error}"])


def _judge(path: Path, lesson: str, limits: Limits, variant: int) -> Judged:
    word = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place,
        open(Path(place, "marks"), "ab") as marks,  # and not to read: the word is in it
        tempfile.TemporaryFile() as errors,
    ):
        folder = Path(place).resolve() / "own"
        folder.mkdir()
        copied = shutil.copyfile(path, folder / f"{lesson}.ipynb")
        told = (copied, lesson, limits.seconds, limits.memory, variant)
        process = subprocess.Popen(
            [*namespaces(), sys.executable, "-m", "tools.grade_one", *map(str, told)],
            stdin=subprocess.PIPE,
            stdout=marks,
            stderr=errors,
            env=environment(folder),
            cwd=folder,
            start_new_session=True,
        )
        stopped = ""
        try:
            with suppress(OSError), process.stdin as stdin:  # it may have ended before
                stdin.write(f"{word}\n".encode())
            stopped = watched(process, limits)
        finally:
            stop(process)
        with open(marks.name, "rb") as written:
            lines = written.read(MOST_SAID).decode(errors="replace").splitlines()
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 1000))
        last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
    said, parts = {}, {}
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):  # the notebook may write there, too
            mark = json.loads(line)
            if mark["word"] != word:
                continue
            if "exercise" not in mark:
                parts |= {name: mark[name] for name in ("held", "texts") if name in mark}
            elif mark["outcome"] in OUTCOMES:
                said[mark["exercise"]] = mark["outcome"], mark["told"], round(mark["seconds"], 1)
    if stopped == "time":
        rest = ["timed out", f"the notebook took longer than {limits.total:g} s"]
    elif stopped:
        rest = ["crashed", f"the notebook took more than {limits.memory:g} GiB of memory"]
    else:
        rest = ["crashed", f"the notebook's process ended with {process.returncode}. {last}"]
    return Judged(said, rest, **parts)


def watched(process: subprocess.Popen, limits: Limits) -> str:
    """Wait for a process; return "", or "time" or "memory" once it takes more than it may.

    Raises KeyboardInterrupt once whoever marks interrupts: nothing is said of the notebook."""
    end = time.monotonic() + limits.total
    while time.monotonic() < end:
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt
        with suppress(subprocess.TimeoutExpired):
            process.wait(LOOK)
            return ""
        if memory_of(process.pid) > limits.memory * 2**30:
            return "memory"
    return "time"


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all that it started, as far as they still run."""
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    return []


def memory_of(pid: int) -> int:
    """Return the bytes of memory that a process and all that it started take."""
    taken = 0
    for one in family(pid):
        with suppress(psutil.Error):
            taken += one.memory_info().rss
    return taken


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    for one in family(process.pid):
        with suppress(psutil.Error):
            one.kill()
    with suppress(ProcessLookupError, PermissionError, AttributeError):  # no groups on Windows
        os.killpg(process.pid, signal.SIGKILL)  # those too whose parent has ended
    process.wait()


# ------------------------------------------------------------------ a class


@cache
def course() -> str:
    """Return a hash of all that decides an outcome, besides the notebook itself."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("peft_lessons/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    for file in sorted([*files, ROOT / "tools" / "grade_one.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def variant_of(student: str, seed: str) -> int:
    """Return which inputs the checks draw for a student: the same each time."""
    digest = hashlib.sha256(f"{seed}/{student}".encode(errors="surrogateescape")).digest()
    return 1000 * (1 + int.from_bytes(digest[:4], "big") % 10**6)


def remembered(
    one: Handed, student: str, folder: Path, limits: Limits, seed: str, again: bool
) -> Judged:
    """Return what becomes of a notebook, from FOLDER/.marked where the notebook, the course, the
    limits and the seed are those of an earlier run."""
    variant = variant_of(student, seed)
    # In a link or a folder there is nothing to read, and they are told in no time.
    readable = one.path.is_file() and not one.path.is_symlink()
    if not readable or one.path.stat().st_size > LARGEST:
        return judge(one.path, one.lesson, limits)
    key = hashlib.sha256(one.path.read_bytes())
    key.update(repr((one.lesson, course(), limits, variant)).encode())
    file = folder / MARKED / f"{key.hexdigest()}.json"
    if not again:
        with suppress(OSError, ValueError, TypeError):
            return Judged(**json.loads(file.read_text(encoding="utf-8")))
    found = judge(one.path, one.lesson, limits, variant)
    file.parent.mkdir(exist_ok=True)
    write_file(file, json.dumps(found.__dict__))
    return found


def marks_of(one: Handed, student: str, name: str, found: Judged, rules: Rules) -> list[Mark]:
    """Return the marks of one notebook, `name` on the page, one for each exercise of its lesson."""
    days, marks = rules.days_late(one, student), []
    for exercise, maximum in rules.maxima(one.lesson).items():
        outcome, told, seconds = found.said.get(exercise, [*found.rest, 0])
        points = round(maximum * rules.share(days) * (outcome == "right"), 2)
        told = printable(told, kept="\n")
        where = student, printable(name), one.lesson, exercise
        marks.append(Mark(*where, outcome, told, seconds, points, maximum, days))
    return marks


def alike(found: Sequence[tuple[str, Handed]]) -> list[str]:
    """Return a sentence for each group of students who handed in the very same file."""
    same: dict[tuple[str, str], list[str]] = defaultdict(list)
    for student, one in found:
        if one.path.is_file() and not one.path.is_symlink():
            with one.path.open("rb") as file:
                same[one.lesson, hashlib.file_digest(file, "sha256").hexdigest()].append(student)
    return [
        f"The same file of {lesson}, byte for byte: {', '.join(students)}."
        for (lesson, _), students in same.items()
        if len(students) > 1
    ]


@dataclass
class Class:
    """Hold a folder of submissions, `handed`, with its roster and rules, and what has become of
    them so far."""

    folder: Path
    people: list[Person]
    rules: Rules
    handed: list[tuple[str, Handed]]
    notes: list[str]
    marks: dict[tuple[str, str], list[Mark]] = field(default_factory=dict)
    judged: dict[tuple[str, str], Judged] = field(default_factory=dict)

    def everyone(self) -> list[Mark]:
        """Return all marks, in the order of the roster, then of those who are on none, with a mark
        "not handed in" for each exercise of a lesson of which a person handed in nothing."""
        handed = {(student, one.lesson) for student, one in self.handed}
        lessons = sorted({lesson for _, lesson in self.marks})
        students = [person.id for person in self.people]
        students += sorted({student for student, _ in handed} - set(students))
        found = []
        for student in students:
            for lesson in lessons:
                if self.people and (student, lesson) not in handed:
                    found += gradebook.absent(student, lesson, self.rules)
                found += self.marks.get((student, lesson), [])
        return found

    def write(self) -> None:
        """Write the tables and pages, each whole or as it was before."""
        marks, place = self.everyone(), self.folder / "feedback"
        held = [set(found.held) for found in self.judged.values() if found.held]
        called = {person.id: person.called for person in self.people}
        tried = {(m.student, m.lesson) for m in marks if m.outcome not in ("not attempted", ABSENT)}
        # Who did nothing has the notebook that was handed out, as others have.
        same = alike(
            [(called.get(s, s), one) for s, one in self.handed if (s, one.lesson) in tried]
        )
        notes = [guards(set.intersection(*held) if held else ()), *same, *self.notes]
        rows = [[f.name for f in fields(Mark)], *map(astuple, marks)]
        write_file(self.folder / "grades.csv", gradebook.csv_of(rows))
        write_file(self.folder / "grades_wide.csv", gradebook.wide(marks, self.people))
        texts = [
            (student, lesson, printable(above), printable(text, kept="\n"))
            for (student, lesson), found in sorted(self.judged.items())
            for above, text in found.texts
        ]
        head = ("student", "lesson", "below", "text")
        write_file(self.folder / "texts.csv", gradebook.csv_of([head, *texts]))
        page = gradebook.overview(marks, self.rules, notes, called)
        write_file(self.folder / "grades.html", page)
        place.mkdir(exist_ok=True)
        pages = {
            student: gradebook.feedback(called.get(student, student), own, self.rules)
            for student, own in gradebook.by_student(marks).items()
        }
        names = gradebook.file_names(pages)
        for student, page in pages.items():
            write_file(place / f"{names[student]}.html", page)
        for path in place.glob("*.html"):  # of an earlier run, under a name that nobody has now
            if path.stem not in names.values():
                path.unlink()
        folders = {one.who: student for student, one in self.handed}
        if archive := gradebook.moodle_archive(pages, folders):
            write_file(self.folder / "feedback_moodle.zip", archive)


def jobs_here() -> int:
    """Return how many notebooks run at once by default: one a core, as far as memory allows."""
    memory = machine.memory()
    return max(1, min(machine.cores(), memory // (EACH * 2**30) if memory else 1))


def left(seconds: float, done: int, whole: int) -> str:
    """Return an estimate of the time that is left, as a text."""
    rest = seconds / done * (whole - done)
    return (
        "" if done == whole else f", {rest / 60:.0f} min left" if rest > 90 else ", a minute left"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.grade", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--roster", type=Path, help="a CSV file: a gradebook, or id, name, e-mail")
    parser.add_argument(
        "--rules", type=Path, help="a TOML file: points, due, late, extensions, seed"
    )
    parser.add_argument("--lesson", nargs="*", default=(), help="only these, such as 02 03")
    parser.add_argument("--seconds", type=float, default=60, help="of one cell or check")
    parser.add_argument("--total", type=float, default=600, help="seconds of one notebook")
    parser.add_argument("--memory", type=float, default=4, help="GiB")
    parser.add_argument("--jobs", type=int, default=jobs_here(), help="notebooks at once")
    parser.add_argument("--again", action="store_true", help="run unchanged notebooks again")
    given = parser.parse_args(argv)
    if given.jobs < 1:
        parser.error("--jobs must be 1 or more")
    if given.folder.is_dir() and not os.access(given.folder, os.W_OK):
        parser.error(f"{given.folder} must be writable: the marks are written there")
    given.folder = given.folder.resolve()
    try:
        given.people = read_roster(given.roster) if given.roster else []
        given.rules = gradebook.read_rules(given.rules) if given.rules else Rules()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    given.found, given.passed = handed_in(given.folder) if given.folder.is_dir() else ([], [])
    given.found = [one for one in given.found if one.lesson.startswith(tuple(given.lesson) or "")]
    if not given.found:
        parser.error(
            f"{given.folder} holds no notebook with the name of a lesson, such as 02_lora.ipynb, "
            "in a student's folder or after a student's name"
        )
    return given


def owners(
    found: Sequence[Handed], people: list[Person]
) -> tuple[list[tuple[str, Handed]], list[str]]:
    """Return (student, notebook) of all that was handed in, and what to say of those who are not on
    the roster. Two notebooks of a lesson that belong to one person are both named; two people with
    one name and no row of the roster are called by the whole name of the file or folder, so that
    neither gets the other's marks."""
    pairs, notes, taken = [], [], {}
    named = [(one, owner(one.who, people), label(one.who)) for one in found]
    times = Counter((name, one.lesson) for one, person, name in named if person is None)
    shared = {name for (name, _), count in times.items() if count > 1}
    notes += [f"Several students are called {name} and marked apart." for name in sorted(shared)]
    for one, person, name in named:
        student = person.id if person else printable(one.who) if name in shared else name
        if (student, one.lesson) in taken:
            notes.append(
                f"{student} handed in {one.lesson} twice, as {taken[student, one.lesson]} "
                f"and as {one.who}, which is marked apart."
            )
            student = printable(one.who)
        taken[student, one.lesson] = one.who
        pairs.append((student, one))
        if people and person is None:
            notes.append(f"Not on the roster: {one.who}.")
    return pairs, [printable(note) for note in dict.fromkeys(notes)]


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    limits = Limits(given.seconds, given.total, given.memory)
    pairs, notes = owners(given.found, given.people)
    names = ", ".join(printable(path.relative_to(given.folder)) for path in given.passed)
    notes += [f"Passed over: {names}."] if names else []
    known = {student for student, _ in pairs} | {person.id for person in given.people}
    if strangers := sorted(given.rules.extensions.keys() - known):
        told = "An extension names a student as grades.csv does"
        notes.append(f"The rules extend the time of nobody here: {', '.join(strangers)}. {told}.")
    group = Class(given.folder, given.people, given.rules, pairs, notes)
    started, done = time.monotonic(), 0
    with ThreadPoolExecutor(given.jobs) as pool:
        waiting = {
            pool.submit(
                remembered, one, student, given.folder, limits, given.rules.seed, given.again
            ): (student, one)
            for student, one in pairs
        }
        try:
            for future in as_completed(waiting):
                student, one = waiting[future]
                name = str(one.path.relative_to(given.folder))
                new = marks_of(one, student, name, future.result(), given.rules)
                key = student, one.lesson
                group.marks[key], group.judged[key] = new, future.result()
                done += 1
                counts = Counter(mark.outcome for mark in new)
                told = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o])
                rest = left(time.monotonic() - started, done, len(pairs))
                print(f"[{done}/{len(pairs)}{rest}] {key[0]} {one.lesson}: {told}", flush=True)
        except BaseException:
            INTERRUPTED.set()
            raise
        finally:  # what is done stays, if this is interrupted
            pool.shutdown(cancel_futures=True)
            INTERRUPTED.clear()
            group.write()
    print("\n".join(filter(None, (*notes, str(given.folder / "grades.html")))))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names in another alphabet than a terminal's
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("Stopped. What was done is written; the same command goes on.")
        raise SystemExit(130) from None
