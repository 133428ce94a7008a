"""Mark students' notebooks: python -m classroom.grade FOLDER [--roster FILE] [--rules FILE]

FOLDER holds what students handed in, as Canvas, Moodle, nbgrader or a hub of repositories hands it
over; classroom/submissions.py has the layouts. Each notebook runs in a process of its own, and each
function that it was to define is judged by the course's check, whatever became of the cells that
call it. In FOLDER then lie

    grades.html       the whole class, with what could not be isolated on this system
    grades.csv        a row an exercise: right, wrong with the cause that the check names, ...
    grades_wide.csv   a row a student, a column an exercise and a total for each lesson
    canvas_*.csv      for Canvas's import, one assignment each, where the rules name its column
    feedback/         a page for each student that shows nobody else
    texts.csv         markdown cells of the students' own: predictions, answers to questions
    causes.csv        how often each cause that a check can name was named

What is unchanged since an earlier run is not run again: FOLDER/.marked remembers it. A notebook has
no network, writes to a temporary folder of its own, and has limits of time, memory and size of
files, as far as the system can set them; grades.html says which. Whatever comes of a notebook, the
others are marked. What could not be marked by a fault that is not the notebook's, as a full disk,
is named, costs nothing, and is tried again by the same command. What the limits do not hold is in
docs/instructors.md.
"""

import argparse
import ctypes
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from functools import cache, partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import BinaryIO, NamedTuple

import psutil

from classroom import gradebook
from classroom.grade_one import TROUBLE, has_landlock, opened
from classroom.gradebook import OUTCOMES, UNMARKED, Mark, Rules
from classroom.submissions import (
    LARGEST,
    Handed,
    Passed,
    Person,
    Submissions,
    handed_in,
    label,
    owner,
    printable,
    read_roster,
    without_lesson,
)
from peft_lessons import machine
from peft_lessons.commands import locked
from peft_lessons.engine import write_atomically
from tools import notebooks
from tools.environment import ROOT, offline_environment

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Nothing else of whoever marks; Windows starts no program without the last five.
INHERITED = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
INHERITED += ("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT")
OWN_FOLDER = ("HOME", "TMPDIR", "IPYTHONDIR", "MPLCONFIGDIR")
OWN_FOLDER += ("USERPROFILE", "APPDATA", "LOCALAPPDATA", "TEMP", "TMP")
MOST_SAID = 4_000_000  # bytes of marks that a notebook's process may send
LOOK = 0.2  # seconds between two looks at a notebook's process
WRITTEN = 2**30  # bytes that a notebook may write, unless the disk has less than four times that
KILLED = -9  # the status of a process that is killed
DEEPEST = 100  # folders below each other: there is no room in a path for many more
ROUNDS = 3  # times the limit of a notebook that all its processes may take together
LEAST = 2**24  # bytes without which nobody can write a mark
HOPELESS = 4  # times that a cell ends the process: then nothing is run but what defines something
EACH = 2  # GiB that one notebook may well take: so many run at once as have that
MARKED = ".marked"
HANDED = re.compile(r"\.(ipynb|zip)$", re.I)
MOST_ALIKE = 20  # pairs of a lesson that the page names
OWN_WORDS = 60  # letters of a text that nobody else writes by chance
INTERRUPTED = threading.Event()
OWN_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Ctrl+C on Windows is not for it
RUNNING: set[int] = set()  # the processes of notebooks


@dataclass(frozen=True)
class Limits:
    """Hold the most seconds of one cell or check, those of a notebook's process in `total`, and GiB
    of memory."""

    seconds: float = 60
    total: float = 600
    memory: float = 4


class Judgment(NamedTuple):
    """Hold what becomes of an exercise: one of the outcomes, the message to the student, the
    seconds that the check took, and the share of the points that the answer earns."""

    outcome: str
    message: str
    seconds: float = 0.0
    share: float = 0.0


NOTHING = Judgment("", "")  # is said yet


@dataclass(frozen=True)
class Result:
    """What became of a notebook: {exercise: its judgment}, the judgment of all other exercises, the
    limits that held, texts of the student's own, [number of a cell, odd words in it], and
    {exercise: the hash of its answer}."""

    judgments: dict[str, Judgment] = field(default_factory=dict)
    rest: Judgment = NOTHING
    held: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    odd: list[list] = field(default_factory=list)
    prints: dict[str, str] = field(default_factory=dict)

    @property
    def lasting(self) -> bool:
        """Whether the same notebook would come out so again: it does not after a full disk."""
        return self.rest.outcome != UNMARKED

    @classmethod
    def read(cls, text: str) -> "Result":
        """Return a result from its JSON."""
        parts = json.loads(text)
        judgments = {name: Judgment(*one) for name, one in parts["judgments"].items()}
        return cls(**parts | {"judgments": judgments, "rest": Judgment(*parts["rest"])})


def failed(why: object) -> Result:
    """Return what becomes of a notebook that cannot be marked, by no fault of its own."""
    return Result({}, Judgment(UNMARKED, f"by no fault of the notebook: {why}"))


# ------------------------------------------------------------------ one notebook


@cache
def namespaces() -> tuple[str, ...]:
    """Return the command that starts another without network, whose processes all end with it."""
    if sys.platform != "linux":
        return ()
    command = ("unshare", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
    # With a /proc of its own it sees no other process either; some containers refuse that.
    for one in ((*command, "--mount-proc"), command):
        with suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([*one, "true"], capture_output=True, timeout=10).returncode == 0:
                return one
    return ()


@cache
def with_us() -> tuple[str, ...]:
    """Return the command that starts another which ends with this process, even a killed one."""
    command = ("setpriv", "--pdeathsig", "KILL")
    with suppress(OSError, subprocess.TimeoutExpired):
        if subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0:
            return command
    return ()


def guards(held: Iterable[str]) -> str:
    """Return what held the notebooks, as a sentence; `held` is what could be set for all of them:
    "network" says that they ran in namespaces."""
    held = set(held)
    network = "without network" if "network" in held else "without network for Python code"
    files = "in a folder of its own" if "files" in held else "WITH ALL YOUR FILES IN REACH"
    kinds = ["time", "memory", *(["size of files"] if "file size" in held else [])]
    watched = "" if "memory" in held else " Memory was watched, not limited by the system."
    limited = f"{', '.join(kinds[:-1])} and {kinds[-1]}"
    free = "" if "network" in held else " A notebook could end the marking."
    return f"Each notebook ran {network}, {files}, with limits of {limited}.{watched}{free}"


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a notebook's process: its home is a folder of its own."""
    env = offline_environment({name: os.environ[name] for name in INHERITED if name in os.environ})
    env |= dict.fromkeys(OWN_FOLDER, str(folder)) | ONE_THREAD
    return env | {"PYTHONPATH": os.pathsep.join([str(ROOT), env["PYTHONPATH"]])}


def judge(path: Path, lesson: str, limits: Limits, variant: int = 0) -> Result:
    """Return what becomes of a notebook, whatever it is; `variant` chooses the checks' inputs."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
            why = "the notebook is a link, no file, or larger than 20 MB"
            return Result({}, Judgment("crashed", why))
        if not path.stat().st_size:
            return Result({}, Judgment("crashed", "the notebook is an empty file"))
        return _in_rounds(path, lesson, limits, variant)
    except Exception as error:  # whatever it is, the others are marked
        return failed(f"{type(error).__name__}: {error}")


def _in_rounds(path: Path, lesson: str, limits: Limits, variant: int) -> Result:
    """Judge a notebook by as many processes as it takes: what one hangs at, or dies of, the next
    one leaves out."""
    names, judgments, skip, last = notebooks.exercises(lesson), {}, [], None
    end, lost, first = time.monotonic() + ROUNDS * limits.total, set(), Result()
    while (rest := end - time.monotonic()) > 0:
        now = replace(limits, total=min(limits.total, rest))
        last = _round(path, lesson, now, variant, [*skip, *judgments])
        judgments |= last.judgments
        if not first.held:  # the first process that came so far found all there is
            first = last
        if not (waiting := [name for name in names if name not in judgments]):
            break
        if not last.lasting:
            if last.full or not last.at:
                break
            if last.at not in lost:
                lost.add(last.at)
                continue
            # What ends so twice at one place ends itself, whatever it says of a full disk.
            why = "here the notebook's process ended twice"
            last = replace(last, rest=Judgment("crashed", why))
        if last.at in waiting:
            judgments[last.at] = last.rest
        elif not last.at or last.at in skip or len(skip) > 2 * HOPELESS:
            break
        elif "cells" in skip:
            skip.append(last.at)
        else:
            slow = last.rest.outcome == "timed out" and not last.silent
            skip.append("cells" if slow or len(skip) == HOPELESS else last.at)
    return Result(judgments, last.rest, first.held, first.texts, first.odd, first.prints)


@dataclass(frozen=True)
class Round(Result):
    """What one process said of a notebook; `at` is the cell or the exercise at which it ended, and
    `silent` whether it hung there, `full` whether the disk was."""

    at: str = ""
    silent: bool = False
    full: bool = False


def _round(path: Path, lesson: str, limits: Limits, variant: int, skip: Sequence[str]) -> Round:
    word = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place,
        open(Path(place, "marks"), "ab") as marks,  # and not to read: the word is in it
        tempfile.TemporaryFile() as errors,
    ):
        folder = Path(place).resolve() / "own"
        folder.mkdir()
        copied = shutil.copyfile(path, folder / f"{lesson}.ipynb")
        arguments = copied, lesson, limits.seconds, limits.memory, variant, ",".join(skip)
        program = sys.executable, "-m", "classroom.grade_one"
        others = children() if adopts() else None
        process = subprocess.Popen(
            [*with_us(), *namespaces(), *program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=marks,
            stderr=errors,
            env=environment(folder),
            cwd=folder,
            start_new_session=True,
            creationflags=OWN_GROUP,
        )
        RUNNING.add(process.pid)
        stopped = ""
        try:
            with suppress(OSError), process.stdin as stdin:  # it may have ended before
                stdin.write(f"{word}\n".encode())
            stopped = watched(process, limits, Path(place))
        finally:
            stop(process)
            if others is not None:
                end_orphans(others)
            RUNNING.discard(process.pid)
        full = stopped == "full" or shutil.disk_usage(place).free < LEAST
        with open(marks.name, "rb") as written:
            lines = written.read(MOST_SAID).decode(errors="replace").splitlines()
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 1000))
        last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
    judgments, parts, at = heard(lines, word)
    if "held" in parts and namespaces():
        parts["held"].append("network")
    ended = process.returncode
    if stopped in ("time", "silence"):
        seconds = limits.total if stopped == "time" else quiet(limits)
        rest = Judgment("timed out", f"the notebook took longer than {seconds:g} s")
    elif stopped == "memory":
        why = f"the notebook took more than {limits.memory:g} GiB of memory"
        rest = Judgment("crashed", why)
    elif stopped == "disk":
        why = "the notebook wrote more than 1 GiB, or a quarter of the free disk"
        rest = Judgment("crashed", why)
    # Whoever killed it from outside was not the notebook, whose process is the first of its own.
    elif full or ended in (TROUBLE, KILLED) or "held" not in parts:
        why = "the disk is full" if full else f"its process ended with {ended}. {last}"
        rest = failed(why).rest
    else:
        rest = Judgment("crashed", f"the notebook's process ended with {ended}. {last}")
    with suppress(OSError):  # folders deeper than Python removes
        if os.path.exists(place):
            subprocess.run(["rm", "-rf", place], capture_output=True)
    return Round(judgments, rest, **parts, at=at, silent=stopped == "silence", full=full)


def heard(lines: Iterable[str], word: str) -> tuple[dict[str, Judgment], dict, str]:
    """Return {exercise: its judgment}, what a process found in the notebook, and what it was about
    to do last, from the lines that carry the word."""
    judgments, parts, at = {}, {}, ""
    for line in lines:
        with suppress(ValueError, TypeError, IndexError):  # the notebook may write there, too
            first, *hexed = line.split(" ")
            if first != word:
                continue
            kind, name, *rest = (bytes.fromhex(t).decode(errors="surrogatepass") for t in hexed)
            if kind == "at":
                at = name
            elif kind == "found" and name in ("held", "texts", "odd", "prints"):
                parts[name] = json.loads(rest[0])
            elif kind == "mark" and rest[0] in OUTCOMES:
                outcome, text, seconds, share = rest
                seconds = round(float(seconds), 1)
                judgments[name] = Judgment(outcome, text, seconds, float(share))
    return judgments, parts, at


def quiet(limits: Limits) -> float:
    """Return after how many seconds in which it says nothing a notebook's process hangs. A cell and
    what it defines, or a check, the check again and what is earned, end before, unless the notebook
    holds the alarm off."""
    return 3 * limits.seconds + 5


def watched(process: subprocess.Popen, limits: Limits, place: Path) -> str:
    """Wait for a process that writes below `place`, where it says in the file `marks` what it does;
    return "", or "time", "silence", "memory" or "disk" once it takes more than it may, or "full" if
    the disk has no room for it.

    Raises KeyboardInterrupt once whoever marks interrupts: nothing is said of the notebook."""
    started = heard_at = time.monotonic()
    room, size = min(WRITTEN, shutil.disk_usage(place).free // 4), 0
    if room < LEAST:
        return "full"
    while (now := time.monotonic()) < started + limits.total:
        if INTERRUPTED.is_set():
            raise KeyboardInterrupt
        with suppress(subprocess.TimeoutExpired):
            process.wait(LOOK)
            return ""
        if memory_of(process.pid) > limits.memory * 2**30:
            return "memory"
        if written_by(process.pid, place) > room:
            return "disk"
        if (new := (place / "marks").stat().st_size) != size:
            size, heard_at = new, now
        if size and now > heard_at + quiet(limits):
            return "silence"
    return "time"


def written_by(pid: int, place: Path) -> int:
    """Return the bytes of the files below a folder, and on Linux those of files that a process
    keeps open after it has removed them."""
    taken, top = 0, len(place.parts)
    for here, folders, files in os.walk(place):
        if len(Path(here).parts) - top > DEEPEST:
            return sys.maxsize  # nobody has so many by accident, and below them all can be hidden
        taken += 4096 * len(folders)
        for name in files:
            with suppress(OSError):
                state = os.lstat(os.path.join(here, name))
                # Windows counts no blocks; an empty file takes a little, too.
                taken += 4096 + getattr(state, "st_blocks", state.st_size // 512) * 512
    for one in family(pid):
        with suppress(OSError):
            for number in os.listdir(f"/proc/{one.pid}/fd"):
                file = f"/proc/{one.pid}/fd/{number}"
                with suppress(OSError):
                    state = os.stat(file)
                    if stat.S_ISREG(state.st_mode) and not state.st_nlink:
                        taken += state.st_blocks * 512
    return taken


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
    """End a process and all that it started, and wait until their files are free."""
    for one in (processes := family(process.pid)):
        with suppress(psutil.Error):
            one.kill()
    with suppress(ProcessLookupError, PermissionError, AttributeError):  # no groups on Windows
        os.killpg(process.pid, signal.SIGKILL)  # those too whose parent has ended
    process.wait()
    psutil.wait_procs(processes, timeout=5)


@cache
def adopts() -> bool:
    """Return whether what a notebook's process leaves behind becomes a child of this one, as Linux
    can have it; with namespaces it has ended."""
    if namespaces() or sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def end_orphans(others: set[int]) -> None:
    """End all children of this process, besides `others` and the notebooks' own, that do not end in
    a moment, and those that they leave."""
    for _ in range(3):
        orphans = children() - others - RUNNING
        time.sleep(LOOK if orphans else 0)
        for pid in (orphans & children()) - RUNNING:
            for one in family(pid):
                with suppress(psutil.Error):
                    one.kill()
            with suppress(psutil.Error):
                psutil.Process(pid).wait(1)


# ------------------------------------------------------------------ a class


@cache
def course() -> str:
    """Return a hash of all that decides an outcome, besides the notebook itself."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("peft_lessons/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    marking = "classroom/grade.py", "classroom/grade_one.py", "tools/notebooks.py"
    files += [ROOT / name for name in marking]
    for file in sorted(files):
        digest.update(file.read_bytes())
    packages = [version(name) for name in ("torch", "transformers", "peft")]
    digest.update(" ".join([sys.version, *packages]).encode())
    return digest.hexdigest()


def variant_of(student: str, seed: str) -> int:
    """Return which inputs the checks draw for a student: the same each time."""
    digest = hashlib.sha256(f"{seed}/{student}".encode(errors="surrogateescape")).digest()
    return 1000 * (1 + int.from_bytes(digest[:4], "big") % 10**6)


def remembered(
    one: Handed, student: str, folder: Path, limits: Limits, seed: str, again: bool
) -> Result:
    """Return what becomes of a notebook, from FOLDER/.marked where the notebook, the course, the
    limits and the seed are those of an earlier run."""
    variant = variant_of(student, seed)
    try:
        # In a link or a folder there is nothing to read, and they are told in no time.
        readable = one.path.is_file() and not one.path.is_symlink()
        if not readable or one.path.stat().st_size > LARGEST:
            return judge(one.path, one.lesson, limits)
        key = hashlib.sha256(one.path.read_bytes())
    except OSError as error:
        return failed(f"the file cannot be read: {error.strerror or error}")
    key.update(repr((one.lesson, course(), limits, variant)).encode())
    file = folder / MARKED / f"{key.hexdigest()}.json"
    if not again:
        with suppress(OSError, ValueError, TypeError):
            return Result.read(file.read_text(encoding="utf-8"))
    result = judge(one.path, one.lesson, limits, variant)
    if result.lasting and not INTERRUPTED.is_set():
        with suppress(OSError):  # then it is marked again another time
            write_atomically({file: json.dumps(asdict(result)).encode()})
    return result


def marks_of(one: Handed, student: str, result: Result, rules: Rules, name: str = "") -> list[Mark]:
    """Return the marks of one notebook, one for each exercise of its lesson; `name` is the
    student's."""
    days, marks = rules.days_late(one, student), []
    for exercise, maximum in rules.maxima(one.lesson).items():
        outcome, message, seconds, share = result.judgments.get(exercise, result.rest)
        share = 1 if outcome == "right" else share if rules.partial and outcome == "wrong" else 0
        mark = Mark(
            student,
            printable(one.name),
            one.lesson,
            exercise,
            outcome,
            printable(message, keep="\n"),
            seconds,
            round(maximum * rules.share(days) * share, 2),
            maximum,
            days,
            gradebook.number_of(one.lesson, exercise),
            name,
            one.attempt,
        )
        marks.append(gradebook.overridden(mark, rules))
    return marks


def alike(results: Iterable[tuple[str, str, Result]]) -> list[str]:
    """Return a sentence for each two students, (name, lesson, what became of the notebook), whose
    answers have the same syntax trees, or who wrote the same text.

    An answer that a third of those who answered gave is nobody's own."""
    groups: dict[str, list[tuple[str, Result]]] = defaultdict(list)
    for name, lesson, result in results:
        groups[lesson].append((name, result))
    notes = []
    for lesson, several in sorted(groups.items()):
        copies = Counter(pair for _, result in several for pair in result.prints.items())
        answered = Counter(exercise for _, result in several for exercise in result.prints)
        common = {p for p, n in copies.items() if n > max(3, answered[p[0]] / 3)}
        words_of = {name: own_words(result) for name, result in several}
        texts = Counter(text for words in words_of.values() for text in words)
        pairs = []
        for (name, mine), (other, yours) in combinations(several, 2):
            both = [e for e in mine.prints if e in yours.prints]
            equal = [e for e in both if mine.prints[e] == yours.prints[e]]
            telling = [e for e in equal if (e, mine.prints[e]) not in common]
            words = {t for t in words_of[name] & words_of[other] if texts[t] <= 3}
            if words or (len(telling) > 1 and 2 * len(equal) >= len(both)):
                says = f"{len(equal)} of {len(both)} answers have the same syntax tree"
                says += f", and {len(words)} of their own texts are the same" if words else ""
                sentence = f"{lesson}, {name} and {other}: {says}."
                pairs.append((-len(telling) - len(words), sentence))
        notes += [sentence for _, sentence in sorted(pairs)[:MOST_ALIKE]]
        if len(pairs) > MOST_ALIKE:
            notes.append(f"{lesson}: {len(pairs) - MOST_ALIKE} more such pairs.")
    return notes


def own_words(result: Result) -> set[str]:
    """Return the texts of a notebook that are long enough to be somebody's own, without spaces."""
    texts = ("".join(text.split()).casefold() for _, text in result.texts)
    return {text for text in texts if len(text) >= OWN_WORDS}


@dataclass
class Class:
    """Hold a folder of submissions, `handed`, with its roster and rules, and what has become of
    them so far."""

    folder: Path
    people: list[Person]
    rules: Rules
    handed: list[tuple[str, Handed]]
    notes: list[str]
    passed: dict[str, list[Passed]] = field(default_factory=dict)
    marks: dict[tuple[str, str], list[Mark]] = field(default_factory=dict)
    results: dict[tuple[str, str], Result] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lost: set[str] = set()
        self._ranks: dict[tuple[str, str], tuple] = {}
        self.called = {person.id: person.called for person in self.people}
        self._names = {person.id: person.name for person in self.people}

    def add(self, student: str, one: Handed, place: int, result: Result) -> list[Mark]:
        """Take in what became of a notebook, and return its marks. Of several attempts the one with
        the most points counts, of equal ones the last, which has the lowest `place`."""
        new = marks_of(one, student, result, self.rules, self._names.get(student, ""))
        key, lost = (student, one.lesson), gradebook.unmarked(new)
        rank = lost, -gradebook.total(new)[0], place
        if lost:
            self.lost.add(f"{self.called.get(student, student)} ({one.lesson})")
        if key not in self._ranks or rank < self._ranks[key]:
            self.marks[key], self.results[key], self._ranks[key] = new, result, rank
        return new

    def everyone(self) -> list[Mark]:
        """Return all marks, in the order of the roster, then of those who are on none, with a mark
        "not handed in" for each exercise of a lesson of which a person handed in nothing."""
        handed = {(student, one.lesson) for student, one in self.handed}
        lessons = sorted({lesson for _, lesson in self.marks})
        students = [person.id for person in self.people]
        students += sorted({student for student, _ in handed} - set(students))
        marks = []
        for student in students:
            for lesson in lessons:
                if self.people and (student, lesson) not in handed:
                    marks += gradebook.absent(student, lesson, self.rules)
                marks += self.marks.get((student, lesson), [])
        return marks

    def remarks(self) -> list[str]:
        """Return what whoever marks should look at, in sentences."""
        held = [set(result.held) for result in self.results.values() if result.held]
        remarks = [guards(set.intersection(*held))] if held else []
        if self.lost:
            lost = ", ".join(sorted(self.lost))
            remarks.append(f"Not marked, by a fault that is not theirs: {lost}. Mark again.")
        for (student, lesson), result in sorted(self.results.items()):
            if result.odd:
                cells = "; ".join(f"cell {number}: {words}" for number, words in result.odd)
                name = self.called.get(student, student)
                remarks.append(f"Look at it by eye: {name}, {lesson}, {cells}.")
        # Who did nothing has the notebook that was handed out, as others have.
        tried = [
            (self.called.get(key[0], key[0]), key[1], result)
            for key, result in sorted(self.results.items())
            if any(mark.outcome != "not attempted" for mark in self.marks[key])
        ]
        return list(map(printable, [*remarks, *alike(tried), *self.notes]))

    def tables(self) -> Iterator[tuple[str, Callable[[], str | bytes | None]]]:
        """Yield (name, how to make it) of each file in the folder."""
        marks, remarks = self.everyone(), self.remarks()
        # No number, so that nobody takes what could not be marked for 0 points.
        blanked = [replace(m, points="") if gradebook.unmarked([m]) else m for m in marks]
        rows = [[f.name for f in fields(Mark)], *map(astuple, blanked)]
        yield "grades.csv", lambda: gradebook.csv_of(rows)
        yield "grades_wide.csv", lambda: gradebook.wide(marks, self.people)
        for lesson, column in self.rules.canvas.items():
            if any(mark.lesson == lesson for mark in marks):
                table = partial(gradebook.canvas_file, lesson, column, marks, self.people)
                yield f"canvas_{lesson}.csv", table
        texts = [
            (student, lesson, printable(above), printable(text, keep="\n"))
            for (student, lesson), result in sorted(self.results.items())
            for above, text in result.texts
        ]
        texts = [("student", "lesson", "below", "text"), *texts]
        yield "texts.csv", lambda: gradebook.csv_of(texts)
        causes = known_causes(sorted({lesson for _, lesson in self.marks}))
        yield "causes.csv", lambda: gradebook.csv_of(gradebook.causes(marks, causes))
        yield "grades.html", lambda: gradebook.overview(marks, self.rules, remarks, self.called)
        students = gradebook.grouped(marks, "student")
        pages = {
            student: partial(self.page, student, of_student)
            for student, of_student in students.items()
        }
        names = gradebook.file_names(pages)
        for student, page in pages.items():
            yield f"feedback/{names[student]}.html", page
        folders = {one.who: student for student, one in self.handed}
        yield (
            "feedback_moodle.zip",
            lambda: gradebook.moodle_archive({s: page() for s, page in pages.items()}, folders),
        )

    def page(self, student: str, marks: Sequence[Mark]) -> str:
        """Return the page of feedback for a student."""
        called, passed = self.called.get(student, student), self.passed.get(student, ())
        return gradebook.feedback(called, marks, self.rules, passed)

    def write(self) -> list[str]:
        """Write the tables and pages, each whole or as it was before, and return those that could
        not be written, as they are open in Excel, or the disk is full. Those of an earlier run that
        this one does not have go: nobody is to hand them out."""
        lost, names = [], set()
        (self.folder / "feedback").mkdir(exist_ok=True)
        for name, content in self.tables():
            try:
                if (made := content()) is not None:
                    names.add(name)
                    made = made.encode() if isinstance(made, str) else made
                    write_atomically({self.folder / name: made})
            except Exception as error:  # whatever it is, the others are written
                names.add(name)
                lost.append(f"{name} ({getattr(error, 'strerror', None) or error})")
        earlier = [f"feedback/{path.name}" for path in (self.folder / "feedback").glob("*.html")]
        earlier += [f"canvas_{lesson}.csv" for lesson in notebooks.MODULES]
        for name in {*earlier, "feedback_moodle.zip"} - names:
            with suppress(OSError):
                (self.folder / name).unlink()
        return lost


def known_causes(lessons: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Return {(lesson, exercise): the causes that its check can name}."""
    from peft_lessons import check  # takes seconds, and only this table needs it

    causes = {}
    for lesson in lessons:
        module = getattr(check, notebooks.MODULES[lesson])
        for exercise in notebooks.exercises(lesson):
            causes[lesson, exercise] = getattr(module, exercise).explanations
    return causes


def jobs_here() -> int:
    """Return how many notebooks run at once by default: one a core, as far as memory allows."""
    memory = machine.memory() or psutil.virtual_memory().total
    return max(1, min(machine.cores(), memory // (EACH * 2**30)))


def left(seconds: float, done: int, count: int) -> str:
    """Return an estimate of the time that is left, as a text."""
    rest = seconds / done * (count - done)
    return (
        "" if done == count else f", {rest / 60:.0f} min left" if rest > 90 else ", a minute left"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m classroom.grade", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--roster", type=Path, help="a CSV file: a gradebook, or id, name, e-mail")
    parser.add_argument(
        "--rules", type=Path, help="a TOML file: points, due, late, override, canvas, ..."
    )
    parser.add_argument("--lesson", nargs="*", default=(), help="only these, such as 02 03")
    parser.add_argument("--seconds", type=float, default=60, help="of one cell or check")
    parser.add_argument("--total", type=float, default=600, help="seconds of one notebook")
    parser.add_argument("--memory", type=float, default=4, help="GiB")
    parser.add_argument("--jobs", type=int, default=jobs_here(), help="notebooks at once")
    parser.add_argument("--again", action="store_true", help="run unchanged notebooks again")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error("--jobs must be 1 or more")
    if min(options.seconds, options.total, options.memory) <= 0:
        parser.error("--seconds, --total and --memory must be above 0")
    if options.folder.is_dir() and not os.access(options.folder, os.W_OK):
        parser.error(f"{options.folder} must be writable: the marks are written there")
    options.folder = options.folder.resolve()
    try:
        refuse_open(options.folder)
        options.people = read_roster(options.roster) if options.roster else []
        options.rules = gradebook.read_rules(options.rules) if options.rules else Rules()
        gradebook.refuse_columns(options.rules, options.people)
        options.submissions = Submissions()
        if options.folder.is_dir():
            options.lock = lock_of(options.folder)
            options.submissions = handed_in(options.folder, options.folder / MARKED)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    chosen = tuple(options.lesson) or ""
    if not options.folder.is_dir():
        parser.error(f"there is no folder {options.folder}")
    if unknown := [c for c in chosen if not any(m.startswith(c) for m in notebooks.MODULES)]:
        parser.error(f"no lesson starts with {unknown[0]}: write two digits, such as 02")
    handed = [one for one in options.submissions.handed if one.lesson.startswith(chosen)]
    options.submissions.handed = handed
    if not handed:
        parser.error(
            f"{options.folder} holds no notebook with the name of a lesson, such as 02_lora.ipynb, "
            "in a student's folder or after a student's name"
            + "".join(f"\n{one.name}: {one.why}" for one in options.submissions.passed[:3])
        )
    return options


def lock_of(folder: Path) -> BinaryIO:
    """Return a file that is locked until it is closed, which the end of the process does, too.

    Raises ValueError while another command marks the folder."""
    (folder / MARKED).mkdir(exist_ok=True)
    lock = (folder / MARKED / "lock").open("ab")
    if not locked(lock):
        lock.close()
        raise ValueError(f"another command marks {folder} just now: wait until it is done")
    return lock


def refuse_open(folder: Path) -> None:
    """Raise ValueError where notebooks could read the course or what others handed in, as both lie
    below a folder that each of them needs."""
    if not has_landlock():
        return
    readable = [*opened(), ROOT / "data", ROOT / "tools", ROOT / "classroom"]
    for what, place in (("The course", ROOT), ("What students handed in", folder)):
        for one in readable:
            if place.is_relative_to(one.resolve()):
                raise ValueError(
                    f"{what} lies in {place}, below {one}, which each notebook may read: move it "
                    "elsewhere, such as to your home folder"
                )


def owners(
    handed: Sequence[Handed], people: list[Person]
) -> tuple[list[tuple[str, Handed]], list[str]]:
    """Return (student, notebook) of all that was handed in, and what to say of those who are not on
    the roster. Two notebooks of a lesson that belong to one person are both named; two people with
    one name and no row of the roster are called by the whole name of the file or folder, so that
    neither gets the other's marks."""
    pairs, notes, taken = [], [], {}
    named = [(one, owner(one.who, people), label(one.who)) for one in handed]
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


def passed_of(
    submissions: Submissions, pairs: Sequence[tuple[str, Handed]], options
) -> dict[str, list[Passed]]:
    """Return {student: what of theirs was passed over}, by the words of the file."""
    students = {one.who: student for student, one in pairs}
    sorted_out: dict[str, list[Passed]] = defaultdict(list)
    for one in submissions.passed:
        person = owner(one.who, options.people) if one.who else None
        student = students.get(one.who) or (person.id if person else label(one.who))
        sorted_out[student].append(one)
    return sorted_out


def remarks_on(options: argparse.Namespace, pairs: Sequence[tuple[str, Handed]]) -> list[str]:
    """Return what to say of a folder and its rules, before anything is marked."""
    notes = [f"Passed over: {one.name} ({one.why})." for one in options.submissions.passed]
    if empty := without_lesson(options.folder, options.submissions):
        notes.append(f"Folders in which no notebook counts: {', '.join(empty)}.")
    if options.submissions.untimed:
        names = ", ".join(options.submissions.untimed)
        notes.append(f"git names no commit, so the time of the file counts: {names}.")
    known = {student for student, _ in pairs} | {person.id for person in options.people}
    for student, points in options.rules.override.items():
        for exercise, value in points.items():
            most = max(options.rules.maxima(m).get(exercise, 0) for m in notebooks.MODULES)
            if value > most:
                notes.append(f"The rules set {value:g} points of {most:g}: {student}, {exercise}.")
    for what, named in (
        ("extend the time", options.rules.extensions),
        ("set points", options.rules.override),
    ):
        if strangers := sorted(named.keys() - known):
            remark = f"The rules {what} of nobody here: {', '.join(strangers)}."
            notes.append(f"{remark} Rules name a student as grades.csv does.")
    return list(map(printable, notes))


def times_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return {path: its times of access and change} of all notebooks and ZIP files in a folder."""
    times = {}
    for here, _, files in os.walk(folder):
        for path in (Path(here, name) for name in files if HANDED.search(name)):
            with suppress(OSError):
                now = path.lstat()
                times[path] = now.st_atime_ns, now.st_mtime_ns
    return times


def set_back(folder: Path, times: Mapping[Path, tuple[int, int]]) -> list[Path]:
    """Give files the times that they had, and return those whose time of change was another: the
    next run would take what a notebook did to another's file for its time of submission."""
    changed = [p for p, now in times_of(folder).items() if p in times and now[1] != times[p][1]]
    for path in changed:
        with suppress(OSError):
            os.utime(path, ns=times[path])
    return changed


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    limits = Limits(options.seconds, options.total, options.memory)
    pairs, notes = owners(options.submissions.handed, options.people)
    # (student, notebook, its place among the student's attempts, of which 0 is the last)
    entries = [(student, one, 0) for student, one in pairs]
    if options.rules.best:
        several = [(s, options.submissions.all_attempts(one)) for s, one in pairs]
        entries = [(s, one, place) for s, all_ in several for place, one in enumerate(all_)]
        names = {one.name for _, one, _ in entries}
        passed = options.submissions.passed
        options.submissions.passed = [one for one in passed if one.name not in names]
    notes += remarks_on(options, pairs)
    passed = passed_of(options.submissions, pairs, options)
    group = Class(options.folder, options.people, options.rules, pairs, notes, passed)
    times = times_of(options.folder)
    started, done = time.monotonic(), 0
    # A notebook takes a while, and without a line the command would look dead until the first.
    print(f"Notebooks: {len(entries)}. At once: {options.jobs}.", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = {
            pool.submit(
                remembered, one, student, options.folder, limits, options.rules.seed, options.again
            ): (student, one, place)
            for student, one, place in entries
        }
        try:
            for future in as_completed(waiting):
                student, one, place = waiting[future]
                new = group.add(student, one, place, future.result())
                done += 1
                counts = Counter(mark.outcome for mark in new)
                summary = ", ".join(f"{counts[o]} {o}" for o in (*OUTCOMES, UNMARKED) if counts[o])
                rest = left(time.monotonic() - started, done, len(entries))
                line = f"[{done}/{len(entries)}{rest}] {student} {one.lesson}: {summary}"
                print(line, flush=True)
        except BaseException:
            INTERRUPTED.set()
            raise
        finally:  # what is done stays, if this is interrupted
            pool.shutdown(cancel_futures=True)
            INTERRUPTED.clear()
            changed = [path.relative_to(options.folder) for path in set_back(options.folder, times)]
            sentence = "The time of {} changed meanwhile, and is set back."
            notes += [sentence.format(printable(name)) for name in changed]
            unwritten = group.write()
    lost = sorted(group.lost)
    if lost:
        notes.append(f"Not marked: {', '.join(lost)}. The same command tries them again.")
    if unwritten:
        notes.append(f"Not written: {', '.join(unwritten)}. Close them elsewhere, or make room.")
    print("\n".join([*notes, str(options.folder / "grades.html")]))
    return 1 if lost or unwritten else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names in another alphabet than a terminal's
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("Stopped. What was done is written; the same command goes on.")
        raise SystemExit(130) from None
