"""Turn marks into points, tables and pages: what an instructor keeps, imports and hands back."""

import csv
import hashlib
import html
import io
import math
import re
import tomllib
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from classroom.submissions import (
    CANVAS_ONLY,
    LATEST,
    MAXIMA,
    MOODLE,
    Handed,
    Passed,
    Person,
    printable,
    read_text,
)
from tools import notebooks

OUTCOMES = ("right", "wrong", "not attempted", "crashed", "timed out")
ABSENT = "not handed in"
UNMARKED = "not marked"  # by a fault of the marking: it costs no points and gives none
CANVAS_OWN = CANVAS_ONLY | {"student", "id", "integration id", "root account", "section"}
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # what a spreadsheet would compute
DAY = timedelta(days=1)


# ------------------------------------------------------------------ points and the late rule


@cache
def titles(lesson: str) -> dict[str, str]:
    """Return {exercise: the heading above it}, such as "Exercise 2.1 · The branch  ★"."""
    headings, title = {}, ""
    for cell in notebooks.read(notebooks.NOTEBOOKS / f"{lesson}.ipynb").cells:
        if cell.cell_type == "markdown":
            above = [title for _, title in notebooks.headings(cell)]
            title = next((t for t in reversed(above) if t.startswith("Exercise")), title)
        elif "exercise" in notebooks.tags(cell):
            headings[notebooks.exercise_name(cell)] = title
    return headings


def stars(lesson: str) -> dict[str, float]:
    """Return {exercise: the stars of its heading}; two functions below one heading share them."""
    headings = titles(lesson)
    shared = Counter(headings.values())
    return {name: title.count("★") / shared[title] for name, title in headings.items()}


def number_of(lesson: str, exercise: str) -> str:
    """Return the number of an exercise, such as "2.1", or ""."""
    match = re.search(r"\d+\.\d+", titles(lesson).get(exercise, ""))
    return match[0] if match else ""


@dataclass(frozen=True)
class Rules:
    """How answers become points: those of a file instead of stars, the time at which each lesson is
    due, the per cent of its points that a lesson loses for each day begun after that, whether of
    several attempts the best counts instead of the last, the days that single students have more,
    whether a wrong answer gives a part of the points, points that are set by hand, the columns of
    Canvas's gradebook, and a secret that decides which inputs the checks draw for whom."""

    points: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    due: Mapping[str, datetime] = field(default_factory=dict)
    late: float = 0
    best: bool = False
    extensions: Mapping[str, float] = field(default_factory=dict)
    partial: bool = False
    override: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    canvas: Mapping[str, str] = field(default_factory=dict)
    seed: str = ""

    def maxima(self, lesson: str) -> dict[str, float]:
        """Return {exercise: its points} of a lesson, in hundredths, so that all tables add up."""
        points = stars(lesson) | dict(self.points.get(lesson, {}))
        return {exercise: round(float(most), 2) for exercise, most in points.items()}

    def days_late(self, one: Handed, student: str) -> int:
        """Return how many days after the due time, the last one begun, a notebook was handed in.

        The time is that of a clone's commit, or else the file's. From Canvas, whose files have
        none, a mark means one day."""
        days = int(bool(one.late) and not self.extensions.get(student))
        if one.late is None and one.lesson in self.due:
            due = self.due[one.lesson] + self.extensions.get(student, 0) * DAY
            seconds = min(max(0.0, one.seconds), LATEST)  # a file may have any time
            handed = datetime.fromtimestamp(seconds, due.tzinfo)
            days = max(0, math.ceil((handed - due) / DAY))
        return days

    def share(self, days: int) -> float:
        """Return the share of the points that is left after some days."""
        return max(0.0, 1 - days * self.late / 100)


def read_rules(path: Path) -> Rules:
    """Read rules from a TOML file. Raises ValueError that names what the course doesn't know."""
    try:
        settings = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from None

    def known(name: str, names: Iterable[str], what: str) -> None:
        if name not in (names := list(names)):
            near = get_close_matches(name, names, 1)
            hint = f": did you mean {near[0]}?" if near else f": {', '.join(names)}"
            raise ValueError(f"{path}: there is no {what} {name!r}{hint}")

    def number(value: object, what: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise ValueError(f"{path}: {what} must be a number from 0 on, not {value!r}")
        return value

    def table(name: str) -> dict:
        if not isinstance(settings.get(name, {}), dict):
            raise ValueError(f"{path}: {name} must be a table, [{name}]")
        return settings.get(name, {})

    for name in settings:
        known(name, (f.name for f in fields(Rules) if f.name != "best"), "setting")
    for lesson in {*table("points"), *table("due"), *table("canvas")}:
        known(lesson, notebooks.MODULES, "lesson")
    for lesson, points in table("points").items():
        if not isinstance(points, dict):
            raise ValueError(f"{path}: points of a lesson are a table, [points.{lesson}]")
        for exercise, value in points.items():
            known(exercise, notebooks.exercises(lesson), f"exercise of {lesson}")
            number(value, f"points.{lesson}.{exercise}")
    for lesson, due in table("due").items():
        if not isinstance(due, datetime):
            raise ValueError(f"{path}: due.{lesson} must be a time such as 2027-03-01T23:59:00")
    for student, days in table("extensions").items():
        number(days, f"extensions.{student}")
    for student, points in table("override").items():
        if not isinstance(points, dict):
            raise ValueError(f'{path}: points of a student are a table, [override."{student}"]')
        for exercise, value in points.items():
            here = (name for one in notebooks.lessons() for name in titles(one.stem))
            known(exercise, here, "exercise")
            number(value, f"override.{student}.{exercise}")
    for lesson, column in table("canvas").items():
        if not isinstance(column, str):
            raise ValueError(f"{path}: canvas.{lesson} must be the name of a column of Canvas's")
    if not isinstance(partial := settings.get("partial", False), bool):
        raise ValueError(f"{path}: partial must be true or false, not {partial!r}")
    # A number, "best", or both.
    late = settings.get("late", 0)
    late = late if isinstance(late, list) else [late]
    best = "best" in late
    rest = [value for value in late if value != "best"]
    if len(rest) > 1 or (not rest and not best):
        raise ValueError(f'{path}: late must be a number, "best", or both as in [20, "best"]')
    return Rules(
        table("points"),
        table("due"),
        number(rest[0], "late") if rest else 0,
        best,
        table("extensions"),
        partial,
        table("override"),
        table("canvas"),
        str(settings.get("seed", "")),
    )


# ------------------------------------------------------------------ marks


@dataclass(frozen=True)
class Mark:
    """The outcome of an exercise, with its points out of `maximum`, the late rule applied. `name`
    is the student's, `notebook` the file that was judged, `attempt` a platform's number of it, and
    `by_hand` says that the points were set by hand."""

    student: str
    notebook: str
    lesson: str
    exercise: str
    outcome: str
    told: str
    seconds: float
    points: float = 0
    maximum: float = 0
    days_late: int = 0
    number: str = ""
    name: str = ""
    attempt: int = 0
    by_hand: bool = False


def absent(student: str, lesson: str, rules: Rules) -> list[Mark]:
    """Return the marks of a student who did not hand in a lesson."""
    return [
        overridden(
            Mark(
                student, "", lesson, exercise, ABSENT, "", 0, 0, most,
                number=number_of(lesson, exercise),
            ),
            rules,
        )
        for exercise, most in rules.maxima(lesson).items()
    ]  # fmt: skip


def overridden(mark: Mark, rules: Rules) -> Mark:
    """Return a mark with the points that the rules set by hand, where they do."""
    points = rules.override.get(mark.student, {}).get(mark.exercise)
    return mark if points is None else replace(mark, points=round(float(points), 2), by_hand=True)


def tidy(points: float) -> float | int:
    """Return points rounded to hundredths, without a fraction where there is none."""
    points = round(points, 2)
    return int(points) if points == int(points) else points


def total(marks: Iterable[Mark]) -> tuple[float, float]:
    """Return (points, maximum) of some marks."""
    marks = list(marks)
    return tidy(sum(m.points for m in marks)), tidy(sum(m.maximum for m in marks))


def grouped(marks: Sequence[Mark], by: str) -> dict[str, list[Mark]]:
    """Return {student or lesson, as `by` says: its marks}, in the order of the marks."""
    groups: dict[str, list[Mark]] = {}
    for mark in marks:
        groups.setdefault(getattr(mark, by), []).append(mark)
    return groups


def unmarked(marks: Iterable[Mark]) -> bool:
    """Return whether there is a mark that the marking failed to give."""
    return any(mark.outcome == UNMARKED and not mark.by_hand for mark in marks)


# ------------------------------------------------------------------ tables


def text(cell: object) -> object:
    """Return no formula, whatever a spreadsheet makes of it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def csv_of(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as a CSV file that any spreadsheet opens without computing."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows([text(cell) for cell in row] for row in rows)
    return table.getvalue()


def wide(marks: Sequence[Mark], people: Sequence[Person]) -> str:
    """Return a row a student: the columns of the roster, for each lesson a column an exercise and
    its total, then total and maximum. What could not be marked is empty, and so are its totals.

    With Canvas's gradebook as the roster the second row has the maxima, as Canvas wants it."""
    students, rows = grouped(marks, "student"), {person.id: person.row for person in people}
    identity = list(people[0].row) if people else ["student"]
    if canvas := of_canvas(people):
        # Its other columns are other assignments, whose points an import would write again.
        identity = [name for name in identity if name.strip().casefold() in CANVAS_OWN]
    maxima = {(m.lesson, m.exercise): m.maximum for m in marks}
    # {head of a column: (the marks that count in it, their maximum)}
    columns = {}
    for lesson, these in grouped(marks, "lesson").items():
        names = list(dict.fromkeys(m.exercise for m in these))
        columns |= {f"{lesson} {name}": [(lesson, name)] for name in names}
        columns[f"{lesson} total"] = [(lesson, name) for name in names]
    columns["total"] = list(maxima)
    most = {head: tidy(sum(maxima[key] for key in keys)) for head, keys in columns.items()}
    table = [[*identity, *columns, "maximum"]]
    if canvas:
        blank = [f"    {MAXIMA.title()}", *[""] * (len(identity) - 1)]
        table.append([*blank, *most.values(), most["total"]])
    for student, of_student in students.items():
        marked = {(m.lesson, m.exercise): m for m in of_student}
        row = rows.get(student, {identity[0]: student})
        cells = [_sum(marked[key] for key in keys if key in marked) for keys in columns.values()]
        table.append([*(row.get(name, "") for name in identity), *cells, most["total"]])
    return csv_of(table)


def _sum(marks: Iterable[Mark]) -> float | str:
    """Return the points of some marks, nothing if there is none or one is missing."""
    marks = list(marks)
    return "" if not marks or unmarked(marks) else total(marks)[0]


def of_canvas(people: Sequence[Person]) -> bool:
    """Return whether a roster is Canvas's gradebook."""
    columns = people[0].row if people else ()
    return any(name.strip().casefold() in CANVAS_ONLY for name in columns)


def refuse_columns(rules: Rules, people: Sequence[Person]) -> None:
    """Raise ValueError for a column of Canvas's that the roster does not have."""
    if rules.canvas and not of_canvas(people):
        raise ValueError("[canvas] in the rules needs --roster with the gradebook of Canvas")
    for lesson, column in rules.canvas.items():
        if column not in people[0].row:
            near = get_close_matches(column, people[0].row, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"canvas.{lesson}: the roster has no column {column!r}{hint}")


def canvas_file(lesson: str, column: str, marks: Sequence[Mark], people: Sequence[Person]) -> str:
    """Return what Canvas imports as the points of one assignment, and nothing else: the columns by
    which it knows students, and the assignment's."""
    columns = [name for name in people[0].row if name.strip().casefold() in CANVAS_OWN]
    students = grouped([m for m in marks if m.lesson == lesson], "student")
    maxima = {m.exercise: m.maximum for m in marks if m.lesson == lesson}
    most = tidy(sum(maxima.values()))
    table = [[*columns, column], [f"    {MAXIMA.title()}", *[""] * (len(columns) - 1), most]]
    for person in people:
        cells = (person.row.get(name, "") for name in columns)
        table.append([*cells, _sum(students.get(person.id, ()))])
    return csv_of(table)


def causes(marks: Sequence[Mark], known: Mapping[tuple[str, str], Iterable[str]]) -> list[tuple]:
    """Return a row for each cause that the checks of some lessons name, below a head: how many
    answers it was named of, also where it is none. `known` has them by lesson and exercise."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for mark in marks:
        message = " ".join(mark.told.split())
        # One cause can begin as another does.
        for cause in sorted(known.get((mark.lesson, mark.exercise), ()), key=len, reverse=True):
            counts[mark.lesson, mark.exercise, cause] += cause in message
            message = message.replace(cause, "")
    return [("lesson", "number", "exercise", "cause", "answers")] + [
        (lesson, number_of(lesson, exercise), exercise, cause, counts[lesson, exercise, cause])
        for (lesson, exercise), sentences in known.items()
        for cause in sentences
    ]


# ------------------------------------------------------------------ pages

STYLE = """
:root { color-scheme: light dark; background: Canvas; color: CanvasText }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
h1, h2, p { overflow-wrap: anywhere }
table { border-collapse: collapse; margin-bottom: 2em; width: 100% }
th, td { border-bottom: 1px solid #8886; padding: .3em .6em; text-align: left;
  vertical-align: top }
td.told { white-space: pre-wrap; font-size: .9em; overflow-wrap: anywhere }
td.points { white-space: nowrap }
.scroll { overflow-x: auto }
tr.lesson > * { border-top: 2px solid #8886; font-weight: 600 }
tr.lesson td.told { font-weight: 400 }
.right { color: light-dark(#1b7030, #6cc07e) }
.wrong, .crashed, .timed-out { color: light-dark(#b3321f, #ff8b7a) }
@media (max-width: 40em) {
  .marks thead { display: none }
  .marks tr { display: block; border-bottom: 1px solid #8886; padding: .5em 0 }
  .marks td, .marks th { display: inline-block; border: 0; padding: 0 .6em 0 0 }
  .marks td.told { display: block }
  tr.lesson > * { border: 0 }
}
"""


def document(title: str, *parts: str) -> str:
    """Return a page of HTML."""
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><meta name='viewport' content='width=device-width'>"
        f"<style>{STYLE}</style><main><h1>{html.escape(title)}</h1>{''.join(parts)}</main></html>"
    )


def rows_of(rows: Iterable[Sequence[object]], head: Sequence[str]) -> str:
    """Return a table of HTML whose cells are text."""
    top = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return scrolled(f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>")


def scrolled(table: str) -> str:
    """Return a table that scrolls, also by keyboard, where it is wider than the page."""
    return f"<div class='scroll' tabindex='0'>{table}</div>"


def marks_table(marks: Sequence[Mark]) -> str:
    """Return a table of one student's marks, with a row for each lesson's total."""
    heads = ("exercise", "function", "outcome", "points", "what the check says")
    top = "".join(f"<th scope='col'>{head}</th>" for head in heads)
    parts = []
    for lesson, these in grouped(marks, "lesson").items():
        points, maximum = total(these)
        summary = f"{points} of {maximum}{so_far(these)}"
        parts.append(
            f"<tr class='lesson'><th scope='row' colspan='3'>{lesson}</th>"
            f"<td class='points'>{summary}</td><td class='told'>{_judged(these[0])}</td></tr>"
        )
        parts += map(_row, these)
    head = f"<thead><tr>{top}</tr></thead>"
    return f"<table class='marks'>{head}<tbody>{''.join(parts)}</tbody></table>"


def so_far(marks: Iterable[Mark]) -> str:
    """Return what to say behind points of which some are missing."""
    return ", as far as marked" if unmarked(marks) else ""


def _judged(mark: Mark) -> str:
    """Return which file was judged, as HTML."""
    if not mark.notebook:
        return ""
    attempt = f", attempt {mark.attempt}" if mark.attempt else ""
    return html.escape(f"judged: {mark.notebook}{attempt}")


def _row(mark: Mark) -> str:
    """Return a row of one mark."""
    # A right answer's text would say what the outcome says.
    message = mark.told if mark.outcome != "right" else ""
    if mark.by_hand:
        message = "\n".join(filter(None, ["The points were set by hand.", message]))
    elif mark.points > 0 and mark.outcome == "wrong":
        message = f"Part of the points, for what is right in it.\n{message}"
    return (
        f"<tr><td>{mark.number}</td><td>{mark.exercise}</td>"
        f"<td class='{mark.outcome.replace(' ', '-')}'>{mark.outcome}</td>"
        f"<td class='points'>{tidy(mark.points)} of {tidy(mark.maximum)}</td>"
        f"<td class='told'>{html.escape(message)}</td></tr>"
    )


def lateness(marks: Sequence[Mark], rules: Rules) -> str:
    """Return a paragraph for each lesson that came late, and what that costs."""
    late = {m.lesson: m.days_late for m in marks if m.days_late}
    return "".join(
        f"<p>{lesson} was handed in {days} day{'s' if days > 1 else ''} late: "
        f"{rules.share(days):.0%} of its points count.</p>"
        for lesson, days in late.items()
    )


def passed_over(passed: Sequence[Passed]) -> str:
    """Return a list of the files that were passed over, and why."""
    if not passed:
        return ""
    items = "".join(f"<li>{html.escape(f'{one.name}: {one.why}')}</li>" for one in passed)
    return f"<p>Files of yours that were not judged:</p><ul>{items}</ul>"


def feedback(
    called: str, marks: Sequence[Mark], rules: Rules, passed: Sequence[Passed] = ()
) -> str:
    """Return the page for one student, which says nothing of any other."""
    points, maximum = total(marks)
    summary = f"<p>{points} of {maximum} points{so_far(marks)}.</p>"
    parts = summary, lateness(marks, rules), marks_table(marks), passed_over(passed)
    return document(f"Feedback for {called}", *parts)


def overview(
    marks: Sequence[Mark], rules: Rules, notes: Sequence[str], called: Mapping[str, str]
) -> str:
    """Return the instructor's page: a row a student, a row an exercise with the commonest fault,
    and the marks of each student. `called` has the names of students, by what marks call them."""
    students = grouped(marks, "student")
    counts = {s: Counter(m.outcome for m in of_student) for s, of_student in students.items()}
    kinds = (*OUTCOMES, ABSENT, *([UNMARKED] if unmarked(marks) else []))
    rows = "".join(
        f"<tr><td><a href='#{n}'>{html.escape(called.get(s, s))}</a></td>"
        f"<td>{total(of_student)[0]}{so_far(of_student)}</td>"
        + "".join(f"<td>{counts[s][kind] or ''}</td>" for kind in kinds)
        + "</tr>"
        for n, (s, of_student) in enumerate(students.items())
    )
    top = "".join(f"<th scope='col'>{name}</th>" for name in ("student", "points", *kinds))
    parts = [f"<p>{html.escape(note)}</p>" for note in notes]
    parts.append(scrolled(f"<table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>"))
    parts.append("<h2>Exercises</h2>" + rows_of(commonest(marks), EXERCISE_HEAD))
    for n, (student, of_student) in enumerate(students.items()):
        title = f"<h2 id='{n}'>{html.escape(called.get(student, student))}</h2>"
        parts += [title, lateness(of_student, rules), marks_table(of_student)]
    return document("Marks", *parts)


EXERCISE_HEAD = ("exercise", "right", "not attempted", "of", "the commonest fault", "how often")


def commonest(marks: Sequence[Mark]) -> list[tuple]:
    """Return a row for each exercise: how many gave a right answer and how many none, of how many
    that handed in its lesson, and what the check said most often of the others.

    One message for all exercises of a notebook, as of a damaged file, is no fault of theirs."""
    rows = []
    handed = [m for m in marks if m.outcome not in (ABSENT, UNMARKED)]
    messages: dict[tuple[str, str], list[str]] = defaultdict(list)
    for mark in handed:
        messages[mark.student, mark.lesson].append(mark.told)
    damaged = {key for key, texts in messages.items() if len(texts) > 1 and len(set(texts)) == 1}
    for lesson, exercise in dict.fromkeys((m.lesson, m.exercise) for m in handed):
        these = [m for m in handed if (m.lesson, m.exercise) == (lesson, exercise)]
        right = sum(m.outcome == "right" for m in these)
        blank = sum(m.outcome == "not attempted" for m in these)
        faults = Counter(
            fault(m)
            for m in these
            if m.outcome not in ("right", "not attempted") and (m.student, lesson) not in damaged
        )
        message, count = (faults.most_common(1) or [("", "")])[0]
        rows.append((f"{lesson} {exercise}", right, blank, len(these), message, count))
    return rows


def fault(mark: Mark) -> str:
    """Return the cause that a check names, or else the first line of what it says."""
    cause = re.search(r"Likely cause: (.*)", mark.told)
    return cause[1] if cause else mark.told.partition("\n")[0]


# ------------------------------------------------------------------ files


def file_names(students: Iterable[str]) -> dict[str, str]:
    """Return {student: a name that every file system takes}. Two students have two, whatever their
    names, also where a file system takes Jo and jo, or two ways to write é, for one."""
    names = {student: re.sub(r"[^\w.@ -]", "_", student).strip(". ")[:50] for student in students}
    alike = Counter(map(folded, names))
    for student, safe in names.items():
        reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d|)(\..*)?", safe, re.I)
        if safe != student or reserved or alike[folded(student)] > 1:
            digest = hashlib.sha256(student.encode(errors="surrogateescape")).hexdigest()
            names[student] = f"{safe or '_'}-{digest[:8]}"
    return names


def folded(name: str) -> str:
    """Return a name as a file system has it that ignores case and ways to write an accent."""
    return unicodedata.normalize("NFKC", name).casefold()


def moodle_archive(pages: Mapping[str, str], folders: Mapping[str, str]) -> bytes | None:
    """Return a ZIP file that Moodle takes as feedback files of many students: a page in a folder
    named as the student's in Moodle's download, of `folders` {folder: student}. None where nothing
    came from Moodle.

    Moodle reads the number in the name. Before 4.1 it looks for an underscore at the end, too."""
    marks = {MOODLE.fullmatch(folder): student for folder, student in folders.items()}
    named = {
        f"{printable(mark['name'])}_{mark['id']}_assignsubmission_file_": student
        for mark, student in marks.items()
        if mark and student in pages
    }
    if not named:
        return None
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder, student in sorted(named.items()):
            archive.writestr(f"{folder}/feedback.html", pages[student])
    return file.getvalue()
