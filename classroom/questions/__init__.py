"""Remake the runs behind docs/questions.md: python -m classroom.questions [NN ...]

The page asks four questions a lesson, two of them on a figure of a run that the lesson doesn't
show. Each module here makes that run: its function `run` returns the figure and the numbers. The
command writes docs/questions/NN.png and the numbers, docs/questions/numbers.json."""

import argparse
import ast
import contextlib
import io
import json
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from matplotlib.figure import Figure

from peft_lessons.studies import plots
from tools import notebooks
from tools.environment import ROOT

FOLDER = ROOT / "docs" / "questions"
NUMBERS = FOLDER / "numbers.json"
LESSONS = {path.stem[:2]: path for path in notebooks.lessons()}


@dataclass(frozen=True)
class Run:
    """Hold a run's figure and {name: number, or list or dict of numbers}: settings, results."""

    figure: Figure
    numbers: dict[str, Any]


def bound(cell) -> set[str]:
    """Return the names that a code cell binds at its top level."""
    defined = notebooks.definitions(cell.source)
    kept = [n for n in ast.parse(cell.source).body if getattr(n, "name", None) not in defined]
    names = {n for part in kept for n in ast.walk(part) if isinstance(n, ast.Name)}
    return {*defined} | {n.id for n in names if isinstance(n.ctx, ast.Store)}


def from_lesson(number: str, *names: str) -> dict[str, Any]:
    """Run a lesson's set-up, its stubs, and the first cell that binds each of the names, in the
    lesson's order, and return all that they define. A run with these names is the lesson's, with
    other settings; the course's answers stand in for the stubs.

    Raises ValueError for a name that no cell binds."""
    cells = notebooks.code_cells(notebooks.read(LESSONS[number]))
    stubs = {"exercise", "exercise-setup"}
    chosen = {0} | {n for n, cell in enumerate(cells) if stubs & set(notebooks.tags(cell))}
    for name in names:
        found = [n for n, cell in enumerate(cells) if name in bound(cell)]
        if not found:
            raise ValueError(f"lesson {number} has no cell that binds {name!r}")
        chosen.add(found[0])
    space: dict[str, Any] = {"__name__": f"lesson_{number}"}
    with contextlib.redirect_stdout(io.StringIO()):
        for n in sorted(chosen):
            exec(compile(cells[n].source, f"lesson {number}, code cell {n}", "exec"), space)
    return space


def plain(value: Any) -> Any:
    """Return numbers as JSON has them: arrays and tensors as lists, to five significant digits, and
    what is below a ten-thousandth as 0, because rounding makes such a number."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, str | int):
        return value
    return float(f"{value:.5g}") if abs(value) >= 1e-4 else 0.0


def make(number: str) -> Run:
    """Make the run of a lesson's questions."""
    module = notebooks.MODULES[LESSONS[number].stem]
    return import_module(f"classroom.questions.{module}").run()


def stored() -> dict[str, dict[str, Any]]:
    """Return the numbers of all runs, {lesson: {name: numbers}}."""
    return json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.exists() else {}


def remake(number: str) -> None:
    """Make the run of a lesson's questions and write its figure and numbers."""
    made = make(number)
    shown = plots.still(made.figure, "The alternative text stands in docs/questions.md.")
    (FOLDER / f"{number}.png").write_bytes(shown.png)
    numbers = dict(sorted((stored() | {number: plain(made.numbers)}).items()))
    text = json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"
    NUMBERS.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m classroom.questions", description=__doc__)
    parser.add_argument("lessons", nargs="*", choices=LESSONS, metavar="NN", default=[*LESSONS])
    for number in parser.parse_args(argv).lessons:
        started = time.process_time()
        remake(number)
        print(f"{number}: {time.process_time() - started:.0f} s of processor time")
