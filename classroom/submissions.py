"""Find what students handed in, in the layouts of learning platforms, and who handed it in.

A notebook counts if its name contains a lesson's: in a student's folder, at any depth, or after
the prefix that a platform puts before it. So these are found:

    jane/02_lora.ipynb, jane/02_lora/02_lora.ipynb    folders, nbgrader, repositories
    doejane_LATE_1234_5678_02_lora-1.ipynb            Canvas: name, user, submission, attempt
    Jane Doe_1234_assignsubmission_file/02_lora.ipynb Moodle, also without the folder
    jane_02_lora.ipynb                                any other prefix

A ZIP file is opened where it is a student's: in a student's folder, or with a platform's prefix.
"""

import codecs
import csv
import errno
import hashlib
import io
import os
import re
import shutil
import subprocess
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tools import notebooks

LESSONS = "|".join(notebooks.MODULES)
# Canvas names a second attempt 02_lora-1. Other endings are a browser's, as in 02_lora (1), or a
# student's, as in 02_lora_jane. A student's words may stand between a platform's and 02_lora, too,
# and what a student types may be large or small.
NAME = re.compile(rf"(?:(.*)[\W_])?({LESSONS})(?:-(\d+))?((?:[\W_].*)?)", re.S | re.I)
CANVAS = re.compile(r"(?P<name>.+?)(?P<late>_LATE)?_(?P<id>\d+)_\d+(?:_.*)?", re.S)
MOODLE = re.compile(r"(?P<name>.+)_(?P<id>\d+)_assignsubmission_(?:file|onlinetext)(?:_.*)?", re.S)
# Columns of a roster by which a student is called in tables and files, the best first.
IDS = ("id", "student id", "sis user id", "id number", "idnumber", "identifier", "username")
IDS += ("login", "sis login id", "email", "email address", "e-mail", "name", "student", "full name")
NAMES = ("name", "student", "full name", "full_name")
FIRST, LAST = ("first name", "first_name", "given name"), ("last name", "last_name", "surname")
# Columns that name a group, and cells such as 8.5, which are points unless the column is an id's.
SHARED = {"section", "sections", "group", "groups", "class", "course", "team", "root account"}
NUMBER = re.compile(r"\d{1,3}([.,]\d+)?")
MAXIMA = "points possible"  # the first cell of the second row of Canvas's gradebook
CANVAS_ONLY = {"sis user id", "sis login id"}


LARGEST = 20_000_000  # bytes of a notebook
MOST_UNPACKED = 100_000_000  # bytes of the notebooks in a ZIP file
UNPACKED = "unpacked"  # in the folder of what is remembered


@dataclass(frozen=True)
class Handed:
    """A notebook that counts: who, by the file's own words, and the path; `late` is what Canvas
    says, None from elsewhere; `seconds` is the time of the file, from Canvas that of the ZIP file;
    `name` is that of the file in the folder, and `attempt` a platform's number, from 1, or 0."""

    who: str
    lesson: str
    path: Path
    late: bool | None
    seconds: float
    name: str = ""
    attempt: int = 0


@dataclass(frozen=True)
class Passed:
    """A file or folder that does not count, as named in the folder, why, and whose it is by its own
    words, "" where they do not say."""

    name: str
    why: str
    who: str = ""


@dataclass
class Submissions:
    """What a folder holds: the notebooks that count, all that came of a student for a lesson, the
    last one first, what is passed over, and files of clones of which git names no commit."""

    handed: list[Handed] = field(default_factory=list)
    attempts: dict[tuple[str, str], list[Handed]] = field(default_factory=dict)
    passed: list[Passed] = field(default_factory=list)
    untimed: list[str] = field(default_factory=list)

    def all_attempts(self, one: Handed) -> list[Handed]:
        """Return all that came from the same student for the same lesson, the last one first."""
        return next((all_ for all_ in self.attempts.values() if one in all_), [one])


@dataclass
class Person:
    """A student: `id` names them in tables and files, `row` is their row of the roster."""

    id: str
    name: str = ""
    row: dict[str, str] = field(default_factory=dict)

    @property
    def called(self) -> str:
        """The name with the id behind it."""
        return f"{self.name} ({self.id})" if self.name and self.name != self.id else self.id


def printable(text: object, keep: str = "") -> str:
    """Return a text in which control characters, except those of `keep`, and what no encoding knows
    are spelt out: two names stay two."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


def squeezed(text: str) -> str:
    """Return the letters and digits of a text, small; a letter and its accent are one."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).casefold())


def handed_in(folder: Path, remembered: Path | None = None) -> Submissions:
    """Return what students handed in: the notebooks that count, the last of each student's for a
    lesson, in order, and what is passed over.

    A copy such as 02_lora (1) or my_02_lora counts only where the student handed in no 02_lora.
    ZIP files are unpacked below `remembered`, and passed over without it. So is a folder that holds
    what several students handed in, by a platform's words. Raises OSError for a full disk."""
    submissions, ranked = Submissions(), defaultdict(list)
    unpacked = remembered / UNPACKED if remembered else None
    if unpacked:
        shutil.rmtree(unpacked, ignore_errors=True)
    several: dict[str, set[str]] = defaultdict(set)
    for path, inside, seconds in _files(folder, submissions, unpacked):
        first, *inner = inside.parts
        match = NAME.fullmatch(inside.stem)
        prefix, lesson, attempt, copy = match.groups() if match else (None,) * 4
        if match and inner and not _zipped(first):
            words = (prefix or "") if len(inner) == 1 else inner[0]
            if mark := MOODLE.fullmatch(words) or (len(inner) == 1 and canvas(words)):
                several[first].add(f"{mark['name']}_{mark['id']}")
        # A ZIP file beside the folders has a platform's words before it, and no folder's name.
        who = PurePosixPath(first).stem if inner and _zipped(first) else first if inner else prefix
        name = str(inside)
        if not match:
            words = who or (inside.stem if canvas(inside.stem) else "")
            submissions.passed.append(
                Passed(name, "its name contains the name of no lesson", words)
            )
            continue
        if not who:
            why = "it lies in no student's folder and has no student's name before the lesson's"
            submissions.passed.append(Passed(name, why))
            continue
        platform = not inner or _zipped(first)
        mark = canvas(who) if platform else None
        late = bool(mark["late"]) if mark else None
        number = int(attempt or 0)
        nth = number + 1 if mark and not copy else 0
        one = Handed(who, lesson.lower(), path, late, seconds, name, nth)
        # Of a platform's attempts the number says which is the last, whatever unpacking did.
        rank = (not copy and not (inner and prefix), number, seconds)
        ranked[whose(who) if platform else first, lesson.lower()].append((rank, one))
    crowded = {name for name, owners in several.items() if len(owners) > 1}
    why = "its folder holds what several students handed in: mark that folder, or unpack it here"
    for key in [key for key in ranked if key[0] in crowded]:
        submissions.passed += [Passed(one.name, why, one.who) for _, one in ranked.pop(key)]
    for key, group in ranked.items():
        ordered = sorted(group, key=lambda pair: (pair[0], pair[1].name), reverse=True)
        submissions.attempts[key] = [one for _, one in ordered]
        (_, newest), *older = ordered
        submissions.handed.append(newest)
        why = f"{PurePosixPath(newest.name).name} counts, which is newer or has the lesson's name"
        submissions.passed += [Passed(one.name, why, one.who) for _, one in older]
    submissions.handed.sort(key=lambda one: (one.who, one.lesson))
    submissions.passed.sort(key=lambda one: one.name)
    return submissions


def without_lesson(folder: Path, submissions: Submissions) -> list[str]:
    """Return the names of the folders, one for each student, in which no notebook counts."""
    counted = {PurePosixPath(one.name).parts[0] for one in submissions.handed}
    others = {"feedback"} | counted
    names = (path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    return sorted(name for name in names if name not in others)


def is_hidden(name: str) -> bool:
    """Return whether a name is that of Jupyter's checkpoints, of what a student had before a
    corrected lesson, or of a Mac's notes."""
    return name.startswith((".", "before-update", "__MACOSX"))


def _zipped(name: str) -> bool:
    return name.lower().endswith(".zip")


def _files(
    folder: Path, submissions: Submissions, unpacked: Path | None
) -> Iterator[tuple[Path, PurePosixPath, float]]:
    """Yield (path, its name in the folder, its time) of each notebook below a folder, those in ZIP
    files too."""
    passed, untimed = submissions.passed, submissions.untimed

    def unreadable(error: OSError) -> None:
        name = Path(error.filename).relative_to(folder).as_posix()
        why = f"it cannot be read: {error.strerror}"
        passed.append(Passed(name, why, name.partition("/")[0]))

    for here, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in sorted(folders + files):
            path = Path(here, name)
            inside = PurePosixPath(path.relative_to(folder).as_posix())
            if is_hidden(name):
                continue
            if name.lower().endswith(".ipynb"):
                with suppress(OSError):  # it is gone
                    yield path, inside, _handed_at(path, folder, untimed)
            elif _zipped(name) and path.is_file() and not path.is_symlink():
                platform = canvas(path.stem) or MOODLE.fullmatch(path.stem)
                if len(inside.parts) == 1 and not platform:
                    why = "a ZIP file is opened in a student's folder, or with a platform's name"
                    passed.append(Passed(str(inside), why))
                elif unpacked:
                    yield from _of_zip(path, inside, passed, unpacked)


def _of_zip(
    path: Path, inside: PurePosixPath, passed: list[Passed], unpacked: Path
) -> Iterator[tuple[Path, PurePosixPath, float]]:
    """Unpack the notebooks of a ZIP file under names of our own, and yield them as `_files`."""
    first = inside.parts[0]
    who = PurePosixPath(first).stem if len(inside.parts) == 1 else first
    digest = hashlib.sha256(str(inside).encode(errors="surrogateescape")).hexdigest()[:16]
    try:
        seconds, room = path.stat().st_mtime, MOST_UNPACKED
        with zipfile.ZipFile(path) as archive:
            for number, info in enumerate(archive.infolist()):
                parts = PurePosixPath(info.filename.replace("\\", "/")).parts
                name = inside.joinpath(*(part for part in parts if part not in ("/", "..")))
                if info.is_dir() or not name.name.lower().endswith(".ipynb"):
                    continue
                if any(is_hidden(part) for part in name.parts):
                    continue
                target = unpacked / digest / f"{number}.ipynb"
                if NAME.fullmatch(name.stem):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(info) as source:
                        content = source.read(LARGEST + 1)  # judged as too large
                    if (room := room - len(content)) < 0:
                        raise ValueError(f"more than {MOST_UNPACKED // 10**6} MB of notebooks")
                    target.write_bytes(content)
                yield target, name, seconds
    except Exception as error:  # a damaged file can raise what it likes
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        why = f"the ZIP file cannot be opened: {type(error).__name__}: {error}"
        passed.append(Passed(str(inside), why, who))


LATEST = 4e9  # seconds of a time that is none, after the year 2096
# What a repository's own settings could make git run is switched off.
GIT = ("git", "--no-pager", "-c", "log.showSignature=false", "-c", "core.fsmonitor=false")
GIT += ("-c", "protocol.allow=never", "-c", "core.sshCommand=false", "-c", "core.hooksPath=")
GIT += ("-c", "safe.directory=*")  # of whoever it is


def _handed_at(path: Path, folder: Path, untimed: list[str]) -> float:
    """Return the time at which a file was handed in: in a clone that of the last commit that
    changed it, elsewhere the file's own. Of a clone in which git names no commit, `untimed` has the
    file then."""
    first = folder / path.relative_to(folder).parts[0]
    if (first / ".git").is_dir():
        log = ("log", "-1", "--format=%ct", "--", path.relative_to(first).as_posix())
        with suppress(OSError, ValueError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [*GIT, "-C", str(first), *log],
                capture_output=True,
                timeout=30,
                env=os.environ | {"GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"},
            )
            if 0 < (seconds := float(done.stdout)) < LATEST:
                return seconds
        untimed.append(path.relative_to(folder).as_posix())
    return path.lstat().st_mtime


def canvas(who: str) -> re.Match | None:
    """Return the parts of a prefix of Canvas's, None if it is none."""
    return None if MOODLE.fullmatch(who) else CANVAS.fullmatch(who)


def whose(who: str) -> str:
    """Return what a prefix says of the student alone: the files of one student in Canvas differ in
    the number of the file, and in the mark that it is late."""
    mark = MOODLE.fullmatch(who) or canvas(who)
    return f"{mark['name']}_{mark['id']}" if mark else who


def label(who: str) -> str:
    """Return the name that stands for a student who is on no roster."""
    mark = MOODLE.fullmatch(who)
    return printable(mark["name"] if mark else whose(who))


# ------------------------------------------------------------------ the roster


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 as Excel's "Unicode text".

    Raises ValueError for any other encoding."""
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f'{path} is not in UTF-8: save it as "CSV UTF-8"') from None


def read_roster(path: Path) -> list[Person]:
    """Read a roster, a CSV file with a header: Canvas's gradebook, Moodle's participants or grading
    worksheet, or a table of your own with a column id, e-mail or name.

    Raises ValueError if it has no such column, or one id twice."""
    text = re.sub(r"\A(?:\s*\n|sep=.\r?\n)*", "", read_text(path))  # Excel's own first line
    head = text.partition("\n")[0]
    comma = max(",;\t", key=head.count)
    people, seen = [], set()
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=comma)
    columns = {(name or "").strip().casefold(): name for name in rows.fieldnames or ()}
    if not columns.keys() & {*IDS}:
        raise ValueError(
            f"{path}: no column of the roster is called id, email or name; rename the columns if "
            "they are in another language"
        )
    try:
        table = list(rows)
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from None
    for row in table:
        row = {name: (cell or "").strip() for name, cell in row.items() if name is not None}

        def cell(names: Iterable[str], row=row) -> str:
            return next(filter(None, (row[columns[n]] for n in names if n in columns)), "")

        name = cell(NAMES) or " ".join(filter(None, (cell(FIRST), cell(LAST))))
        id = printable(cell(IDS) or name)
        if not id or next(iter(row.values())).casefold() == MAXIMA:
            continue  # Canvas has a row of "Manual Posting", too
        if id in seen:
            raise ValueError(f"{path}: two rows of the roster have the id {id!r}")
        seen.add(id)
        people.append(Person(id, printable(name), row))
    if not people:
        raise ValueError(f"{path}: there is no student in the roster")
    return people


def owner(who: str, people: list[Person]) -> Person | None:
    """Return who on the roster handed something in, by the words of the file; None if nobody's row,
    or those of several, fit.

    Canvas's number is looked for in the column ID of Canvas's gradebook alone: elsewhere the same
    number may be another student's. Any other word must be a cell, or the name in any order, or the
    end of a repository's name."""
    mark, moodle = canvas(who), MOODLE.fullmatch(who)
    if mark:
        rows = [(person, _lower(person)) for person in people]
        rows = [(person, row) for person, row in rows if row.keys() & CANVAS_ONLY]
        by_id = [person for person, row in rows if row.get("id") == mark["id"]]
        if rows:  # then the number decides: another with the same name may be in another section
            return by_id[0] if len(by_id) == 1 else None
    word = (mark or moodle)["name"] if mark or moodle else who
    tests = [lambda p: word in _cells(p), lambda p: squeezed(word) in _words(p)]
    if moodle:
        number = f"participant {moodle['id']}"
        tests.insert(0, lambda p: number in map(str.casefold, p.row.values()))
    if not mark and not moodle:
        tests.append(lambda p: any(c and word.endswith(f"-{c}") for c in _cells(p)))
    for test in tests:
        fit = [person for person in people if test(person)]
        if fit:
            return fit[0] if len(fit) == 1 else None
    return None


def _lower(person: Person) -> dict[str, str]:
    return {name.strip().casefold(): cell for name, cell in person.row.items()}


def _cells(person: Person) -> list[str]:
    """Return the cells that may name a person: not the section, nor points."""
    cells = _lower(person)
    named = {n: c for n, c in cells.items() if n not in SHARED and not NUMBER.fullmatch(c)}
    return [*named.values(), *(cells[name] for name in cells.keys() - named.keys() if name in IDS)]


def _words(person: Person) -> set[str]:
    """Return the squeezed cells of a row, and the name with its parts exchanged."""
    parts = re.split(r",\s*|\s+", person.name)
    turned = {squeezed("".join(parts[i:] + parts[:i])) for i in range(len(parts))}
    cells = set(map(squeezed, _cells(person)))
    return {word for word in cells | turned if word}
