"""Find what students handed in, in the layouts of learning platforms, and who handed it in.

A notebook counts if its name contains a lesson's: in a student's folder, at any depth, or after
the prefix that a platform puts before it. So these are found:

    jane/02_lora.ipynb, jane/02_lora/02_lora.ipynb    folders, nbgrader, repositories
    doejane_LATE_1234_5678_02_lora-1.ipynb            Canvas: name, user, submission, attempt
    Jane Doe_1234_assignsubmission_file/02_lora.ipynb Moodle, also without the folder
    jane_02_lora.ipynb                                any other prefix
"""

import codecs
import csv
import io
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tools import notebooks

LESSONS = "|".join(notebooks.MODULES)
# Canvas names a second attempt 02_lora-1. Other endings are a browser's, as in 02_lora (1), or a
# student's, as in 02_lora_jane. A student's words may stand between a platform's and 02_lora, too.
NAME = re.compile(rf"(?:(.*)_)?({LESSONS})(?:-(\d+))?((?:[\W_].*)?)", re.S)
CANVAS = re.compile(r"(?P<name>.+?)(?P<late>_LATE)?_(?P<id>\d+)_\d+(?:_.*)?", re.S)
MOODLE = re.compile(r"(?P<name>.+)_(?P<id>\d+)_assignsubmission_(?:file|onlinetext)(?:_.*)?", re.S)
# Columns of a roster by which a student is called in tables and files, the best first.
IDS = ("id", "student id", "sis user id", "id number", "idnumber", "identifier", "username")
IDS += ("login", "sis login id", "email", "email address", "e-mail", "name", "student", "full name")
NAMES = ("name", "student", "full name", "full_name")
FIRST, LAST = ("first name", "first_name", "given name"), ("last name", "last_name", "surname")
MAXIMA = "points possible"  # the first cell of the second row of Canvas's gradebook
CANVAS_ONLY = {"sis user id", "sis login id"}


@dataclass(frozen=True)
class Handed:
    """A notebook that counts: who, by the file's own words, and the path; `late` is what Canvas
    says, None from elsewhere; `seconds` is the time of the file, from Canvas that of the ZIP."""

    who: str
    lesson: str
    path: Path
    late: bool | None
    seconds: float


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


def printable(text: object, kept: str = "") -> str:
    """Return a text in which control characters, except those `kept`, and what no encoding knows
    are spelt out: two names stay two."""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in str(text))


def squeezed(text: str) -> str:
    """Return the letters and digits of a text, small; a letter and its accent are one."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).casefold())


def handed_in(folder: Path) -> tuple[list[Handed], list[Path]]:
    """Return the notebooks that count, the last of each student's for a lesson, in order, and the
    notebooks and folders that are passed over.

    A copy such as 02_lora (1) or my_02_lora counts only where the student handed in no 02_lora."""
    found: dict[tuple[str, str], list[tuple[tuple, Handed]]] = defaultdict(list)
    passed: list[Path] = []
    for here, folders, files in os.walk(folder, onerror=lambda e: passed.append(Path(e.filename))):
        # Jupyter's checkpoints, what a student had before a corrected lesson, and a Mac's notes.
        folders[:] = [n for n in folders if not n.startswith((".", "before-update", "__MACOSX"))]
        names = [n for n in folders + files if n.endswith(".ipynb") and not n.startswith("._")]
        for path in (Path(here, name) for name in names):
            first, *inner = path.relative_to(folder).parts
            match = NAME.fullmatch(path.stem)
            prefix, lesson, attempt, copy = match.groups() if match else (None,) * 4
            who = first if inner else prefix
            if not who or not match:
                passed.append(path)
                continue
            seconds = path.lstat().st_mtime
            mark = None if inner else canvas(who)
            one = Handed(who, lesson, path, bool(mark["late"]) if mark else None, seconds)
            # Of a platform's attempts the number says which is the last, whatever unpacking did.
            rank = (not copy and not (inner and prefix), int(attempt or 0), seconds)
            found[first if inner else whose(who), lesson].append((rank, one))
    last = []
    for several in found.values():
        *older, (_, newest) = sorted(several, key=lambda pair: (pair[0], str(pair[1].path)))
        last.append(newest)
        passed += [one.path for _, one in older]
    return sorted(last, key=lambda one: (one.who, one.lesson)), sorted(passed)


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
    text = read_text(path)
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
    for row in rows:
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
        if len(by_id) == 1:
            return by_id[0]
    word = (mark or moodle)["name"] if mark or moodle else who
    tests = [lambda p: word in p.row.values(), lambda p: squeezed(word) in _words(p)]
    if moodle:
        number = f"participant {moodle['id']}"
        tests.insert(0, lambda p: number in map(str.casefold, p.row.values()))
    if not mark and not moodle:
        tests.append(lambda p: any(c and word.endswith(f"-{c}") for c in p.row.values()))
    for test in tests:
        fit = [person for person in people if test(person)]
        if fit:
            return fit[0] if len(fit) == 1 else None
    return None


def _lower(person: Person) -> dict[str, str]:
    return {name.strip().casefold(): cell for name, cell in person.row.items()}


def _words(person: Person) -> set[str]:
    """Return the squeezed cells of a row, and the name with its parts exchanged."""
    parts = re.split(r",\s*|\s+", person.name)
    turned = {squeezed("".join(parts[i:] + parts[:i])) for i in range(len(parts))}
    cells = set(map(squeezed, person.row.values()))
    return {word for word in cells | turned if word}
