"""Compare the minutes of lessons with their cards: python -m tools.minutes [02 ...] [--write]

A minute is 150 words of prose or 15 lines of code. A displayed equation, a table, a figure and a
long printout take half a minute each. Lines of cells tagged plumbing count a quarter. Exercises
are left out: their headings state their minutes. Sections "## Deeper · …" are counted separately.

The table shows the measured minutes next to those that the lesson's card states. The exit status is
1 if a statement is off. With --write the minutes of all cards go into the README, the map in lesson
00 and the plans for instructors, with their sums, unless a card states none."""

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

from nbformat import NotebookNode

from tools import notebooks
from tools.environment import ROOT

WORDS, LINES = 150, 15  # a minute
SHOWN = 0.5  # minutes for an equation, a table, a figure or a long printout
PLUMBING = 0.25  # of the lines of such a cell
SITTING = 35  # minutes that the core of a lesson may take
README, MAP = ROOT / "README.md", notebooks.NOTEBOOKS / "00_start_here.ipynb"
PLANS = ROOT / "docs" / "instructors.md"

EQUATION = re.compile(r"\$\$.+?\$\$", re.S)
MARKUP = re.compile(r"<[^>]+>|\]\([^)]*\)|[#*|`>_-]+")
UNREAD = ("#", "import ", "from ")  # how lines of code begin that take no time
EXERCISE = re.compile(r"Exercise .* (\d+) min")  # the title of its heading
# A lesson's row in the README or in the map, and a row or the last row of an instructor's plan.
ROW = re.compile(r"(\]\(\S*?(\d\d_\w+)\.ipynb\)[^|\n]*\|[^|\n]*\|) *\d* *\| *\d* *\| *\d* *\|")
PLAN = re.compile(r"(\]\(\S*?(\d\d_\w+)\.ipynb\) \| (core|core and exercises|all) \|) (\d+) \|")
TOGETHER = re.compile(r"(\| \*\*together\*\* \|) \*\*\d+\*\*")
PATH = re.compile(r"(\*\*(Two hours|Half a day|Two days|All)\b[^\n]*?)\d+ h(?: \d+ min)?")


@dataclass
class Minutes:
    """Hold the minutes measured in a lesson: core, each deeper section by title, exercises, and
    those exercises that are in the core."""

    core: float = 0.0
    sections: dict[str, float] = field(default_factory=dict)
    exercises: int = 0
    core_exercises: int = 0

    @property
    def deeper(self) -> float:
        return sum(self.sections.values())


@dataclass(frozen=True)
class Card:
    """Hold the minutes that a lesson's card states; None where it states none. All exercises are
    in the core unless the card states how many are."""

    core: int | None
    deeper: int | None
    exercises: int | None
    core_exercises: int | None = None


def reading(cell: NotebookNode) -> float:
    """Return the minutes that it takes to read a cell and what the cell shows."""
    if cell.cell_type == "markdown":
        equations = EQUATION.findall(cell.source)
        prose = MARKUP.sub(" ", EQUATION.sub(" ", cell.source))
        return len(re.findall(r"\w[\w'’.]*", prose)) / WORDS + SHOWN * len(equations)
    lines = [line.strip() for line in cell.source.splitlines()]
    read = sum(bool(line) and not line.startswith(UNREAD) for line in lines)
    share = PLUMBING if "plumbing" in notebooks.tags(cell) else 1.0
    kinds = [output.get("data", {}).keys() & {"text/html", "image/png"} for output in cell.outputs]
    long = [output.get("text", "").count("\n") > 3 for output in cell.outputs]
    return share * read / LINES + SHOWN * (sum(map(bool, kinds)) + sum(long))


def measured(nb: NotebookNode) -> Minutes:
    """Return the minutes of a lesson by the rule."""
    minutes = Minutes()
    # The deeper section, and the level of the heading of the exercise, that a cell is in.
    section, exercise = None, 0
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            titles = notebooks.headings(cell)
            for level, title in titles:
                section = None if level <= 2 else section
                exercise = 0 if level <= exercise else exercise
                if title.startswith("Exercise"):
                    exercise = level
                if stated := EXERCISE.fullmatch(title):
                    minutes.exercises += int(stated[1])
                    minutes.core_exercises += 0 if section else int(stated[1])
            if notebooks.deeper(cell):
                section = titles[0][1]
        tagged = {"exercise", "check"} & set(notebooks.tags(cell))
        if not exercise and not tagged:
            if section:
                minutes.sections[section] = minutes.sections.get(section, 0.0) + reading(cell)
            else:
                minutes.core += reading(cell)
        if "check" in notebooks.tags(cell):
            exercise = 0  # prose below a check belongs to the lesson again
    return minutes


def card(nb: NotebookNode) -> Card:
    """Return the minutes that the row **Time** of a lesson's card states."""
    rows = [row for cell in nb.cells[:1] for row in cell.source.splitlines()]
    row = next((row for row in rows if row.startswith("| **Time** |")), "")
    stated = [re.search(rf"\b{kind} (\d+) min", row) for kind in ("core", "deeper", "exercises")]
    stated.append(re.search(r"\((\d+) of them in the core\)", row) or stated[-1])
    return Card(*(int(match[1]) if match else None for match in stated))


def is_off(stated: int | None, true: float) -> bool:
    """Return whether a statement is more than a fifth, and more than 3 minutes, off."""
    return true > 1 if stated is None else abs(stated - true) > max(3, true / 5)


def shown(minutes: float | None) -> str:
    return "–" if minutes is None else f"{minutes:.0f}"


def complaints(nb: NotebookNode) -> list[str]:
    """Return a sentence for each statement of minutes in a lesson that is off."""
    if not nb.cells:
        return ["the notebook has no cells"]
    true, stated, problems = measured(nb), card(nb), []
    for part in ("core", "deeper"):
        written, minutes = getattr(stated, part), getattr(true, part)
        if is_off(written, minutes):
            problems.append(
                f"the card says {part} {shown(written)} min, and the rule measures {minutes:.0f}"
            )
    if (stated.exercises or 0) != true.exercises:
        sums = f"the card says exercises {shown(stated.exercises)} min, and their headings"
        problems.append(f"{sums} add up to {true.exercises}")
    elif (stated.core_exercises or 0) != true.core_exercises:
        problems.append(
            f"the card says that {shown(stated.core_exercises)} min of the exercises are in the "
            f"core, and the headings there add up to {true.core_exercises}"
        )
    for title, minutes in true.sections.items():
        written = re.search(r"\((\d+) min\)$", title)
        if written is None:
            problems.append(f"the heading {title!r} does not end with its minutes, as in (12 min)")
        elif is_off(int(written[1]), minutes):
            problems.append(
                f"the heading {title!r} is off: the rule measures {minutes:.0f} minutes"
            )
    return problems


# ------------------------------------------------------------------ tables and plans


# What a plan may ask for of a lesson.
PARTS = {
    "core": ("core",),
    "core and exercises": ("core", "core_exercises"),
    "all": ("core", "deeper", "exercises"),
}


def stated_minutes(one: Card, what: str) -> int:
    """Return the minutes that a card states for "core", "core and exercises" or "all"."""
    return sum(getattr(one, part) or 0 for part in PARTS[what])


def duration(minutes: int) -> str:
    """Return minutes as a text, rounded to a quarter of an hour, such as 3 h 45 min."""
    hours, rest = divmod(15 * round(minutes / 15), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def pages() -> dict[Path, str]:
    """Return {file: its text, with the minutes of all cards and their sums} of README, map and
    plans. Raises ValueError if a card states no minutes, or a linked lesson or plan is missing."""
    stated = {path.stem: card(notebooks.read(path)) for path in notebooks.lessons()}
    if silent := [stem for stem, one in stated.items() if one.core is None]:
        raise ValueError(f"the card of {silent[0]} does not say its minutes, as in core 30 min")
    totals = {"All": sum(stated_minutes(one, "all") for one in stated.values())}

    def linked(stem: str) -> Card:
        if stem not in stated:
            raise ValueError(f"a table links {stem}.ipynb, and there is no such lesson")
        return stated[stem]

    def row(match: re.Match) -> str:
        one = linked(match[2])
        return f"{match[1]} {one.core} | {one.deeper or 0} | {one.exercises or 0} |"

    def planned(match: re.Match) -> str:
        return f"{match[1]} {stated_minutes(linked(match[2]), match[3])} |"

    def plan(part: str) -> str:
        part = PLAN.sub(planned, part)
        together = sum(int(minutes) for *_, minutes in PLAN.findall(part))
        totals[part.partition(":")[0]] = together
        return TOGETHER.sub(rf"\1 **{together}**", part)

    def path(match: re.Match) -> str:
        if match[2] not in totals:
            raise ValueError(f"{PLANS.name} has no heading '### {match[2]}: …'")
        return match[1] + duration(totals[match[2]])

    texts = {file: file.read_text(encoding="utf-8") for file in (README, MAP, PLANS)}
    texts[PLANS] = "### ".join(map(plan, texts[PLANS].split("### ")))
    texts |= {file: ROW.sub(row, texts[file]) for file in (README, MAP)}
    texts[MAP] = PATH.sub(path, texts[MAP])
    return texts


def table(lessons: list[Path]) -> tuple[str, int]:
    """Return (the minutes of lessons, measured and stated, as a text; how many cards are off)."""
    widths, off = (6, 6, 8, 6, 11, 6), 0
    heads = ("core", "card", "deeper", "card", "exercises", "card")
    lines = ["lesson".ljust(20) + "".join(map(str.rjust, heads, widths))]
    for path in lessons:
        nb = notebooks.read(path)
        true, written, wrong = measured(nb), card(nb), complaints(nb)
        pairs = [(getattr(true, p), getattr(written, p)) for p in ("core", "deeper", "exercises")]
        numbers = [shown(number) for pair in pairs for number in pair]
        mark = f"  core above {SITTING}" if true.core > SITTING else ""
        lines.append(path.stem.ljust(20) + "".join(map(str.rjust, numbers, widths)) + mark)
        lines += [f"    ! {text}" for text in wrong]
        off += bool(wrong)
    return "\n".join(lines), off


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.minutes", description=__doc__)
    parser.add_argument("lesson", nargs="*", help="the first characters of lessons, such as 02")
    parser.add_argument("--write", action="store_true", help="fill tables and plans from the cards")
    args = parser.parse_args(argv)
    text, off = table(notebooks.lessons(args.lesson))
    print(f"{text}\ncards that are off: {off}")
    if args.write:
        try:
            written = pages()
        except ValueError as error:
            print(f"nothing is written: {error}")
            return 1
        for file, page in written.items():
            file.write_text(page, encoding="utf-8", newline="\n")
    return 1 if off else 0


if __name__ == "__main__":
    raise SystemExit(main())
